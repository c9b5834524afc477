"""Seams of attention on CUDA: which backend and tile serves which layer."""

import dataclasses
import functools
import inspect

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Policy, Seam, Target, Variable
from bi_patch.seams.overlay import with_globals

_FLASH, _TRITON = "FLASH_ATTN", "TRITON_ATTN"
# Heads for which FlashAttention 3 was shown to give equal bits in decode and prefill, whatever the batch.
_FLASH_HEAD_SIZES = (64, 80, 96, 112, 128, 192, 256)
# Told this for its longest query, FlashAttention 3 never takes its tile for single queries, which for heads of up to
# 64 elements cuts KV elsewhere (the tile of one warp group: up to 64 rows of queries times heads of a group).
_LONG_QUERY = 128
_NO_WINDOW = (-1, -1)
# How FlashAttentionImpl.forward calls FlashAttention 3, by release: the first of these globals that its module has.
_CALLS = ("_FA4_DENSE_ATTENTION_KERNEL", "flash_attn_varlen_func")


def _backend(original):
    """Attention.__init__: layers with a window go to Triton attention; what was not shown is refused by name."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        held = signature.bind(self, *args, **kwargs)
        if held.arguments.get("attn_backend") is None and _window(held.arguments) is not None and not _chosen():
            held.arguments["attn_backend"] = _triton()
        original(*held.args, **held.kwargs)
        _refuse_layer(self, held.arguments)

    return __init__


def _window(arguments) -> int | None:
    """The sliding window that Attention.__init__ will take from its arguments, in tokens."""
    cache = arguments.get("cache_config")
    layers = arguments.get("per_layer_sliding_window")
    return layers if layers is not None or cache is None else cache.sliding_window


def _chosen() -> bool:
    """Whether the user named an attention backend."""
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config().attention_config.backend is not None


def _triton():
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    return TritonAttentionBackend


def _refuse_layer(layer, arguments) -> None:
    name = layer.attn_backend.get_name()
    reason, cure = "", f"--attention-backend {_TRITON}"
    if name not in (_FLASH, _TRITON):
        reason, cure = f"the {name} backend is not covered", f"--attention-backend {_FLASH} or {_TRITON}"
    elif arguments.get("attn_type", "decoder") != "decoder":
        reason, cure = f"{arguments['attn_type']} attention is not covered", "a decoder-only model"
    elif name == _FLASH:
        version = getattr(layer.impl, "vllm_flash_attn_version", None)
        if version != 3:
            reason = f"FlashAttention {version} was not shown to be invariant (3 was)"
        elif layer.sliding_window is not None:
            reason = f"FlashAttention 3 places its tiles by the query's window (of {layer.sliding_window} tokens)"
        elif layer.head_size not in _FLASH_HEAD_SIZES:
            reason = f"FlashAttention 3 was not shown to be invariant for heads of {layer.head_size} elements"
    elif layer.head_size == 256 and _tunes_large_heads():
        reason, cure = f"{name} tiles heads of 256 elements by the query's length on this card", "another card"
    if reason:
        raise UnsupportedFeature(f"attention.cuda_backend: {reason}. Use {cure}, or set BI_PATCH=0")


def _tunes_large_heads() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_device_capability_family(100)


def prefill(q, k, v, pages, scale: float):
    """The prompt q [tokens, heads, D] by FlashAttention 3, as it is served; the form of attention.Prefill."""
    import torch
    from vllm.v1.attention.backends import flash_attn

    def ints(*values):
        return torch.tensor(values, dtype=torch.int32, device=q.device)

    count = len(q)
    return flash_attn.flash_attn_varlen_func(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=ints(0, count),
        max_seqlen_q=count,
        seqused_k=ints(count),
        max_seqlen_k=count,
        softmax_scale=scale,
        causal=True,
        window_size=[-1, -1],
        block_table=pages,
        fa_version=3,
        num_splits=1,
    )


def decoders(config):
    """Decode attention of every layer on FlashAttention 3, each with the prefill that its kernel is compared with."""
    from vllm.model_executor.layers.attention.attention import Attention

    from bi_patch.ops.cuda.attention import Problem

    for layer in config.compilation_config.static_forward_context.values():
        if isinstance(layer, Attention) and layer.attn_backend.get_name() == _FLASH:
            yield Problem(layer.num_heads, layer.num_kv_heads, layer.head_size, layer.dtype), prefill


def _decode(original):
    """FlashAttentionImpl.forward: a batch of single queries takes the bundled kernel where it is certified."""
    name = next(name for name in _CALLS if name in original.__globals__)
    return with_globals(original, **{name: _decode_or(original.__globals__[name])})


def _decode_or(flash):
    """vLLM's call of FlashAttention 3, given to the bundled kernel where that serves."""
    from bi_patch.ops.cuda import attention

    def attend(**given):
        if given["max_seqlen_q"] > 1:
            return flash(**given)
        q, k = given["q"], given["k"]
        if (
            _plain(given)
            and attention.serves(_problem(q, k))
            and attention.attend(
                q,
                k,
                given["v"],
                given["out"],
                given["cu_seqlens_q"],
                given["seqused_k"],
                given["block_table"],
                given["softmax_scale"],
            )
        ):
            return given["out"]
        if q.shape[-1] <= 64:  # the step's schedule may have been made for single queries
            given |= {"max_seqlen_q": _LONG_QUERY, "scheduler_metadata": None}
        return flash(**given)

    return attend


def _problem(q, k):
    from bi_patch.ops.cuda.attention import Problem

    return Problem(q.shape[1], k.shape[2], q.shape[2], q.dtype)


def _plain(given) -> bool:
    """Whether a call of FlashAttention asks for nothing but causal attention over pages that the bundled kernel has."""
    from bi_patch.kernels.cuda import decode

    return (
        given["causal"] is True
        and all(given.get(name) is None for name in ("alibi_slopes", "s_aux", "mask_mod", "dynamic_causal"))
        and not given.get("softcap")
        and tuple(given["window_size"] or _NO_WINDOW) == _NO_WINDOW
        and given["k"].dtype == given["q"].dtype
        and decode.covers_pages(given["k"].shape[1])
    )


def _longest_query(original):
    """FlashAttentionMetadataBuilder.build: with small heads a batch that prefill's kernel decodes is told a long query
    and keeps prefill's tile."""

    @functools.wraps(original)
    def build(self, common_prefix_len, common_attn_metadata, *args, **kwargs):
        longest = common_attn_metadata.max_query_len
        if self.headdim <= 64 and longest < _LONG_QUERY and not (longest == 1 and _decodes(self)):
            common_attn_metadata = dataclasses.replace(common_attn_metadata, max_query_len=_LONG_QUERY)
        return original(self, common_prefix_len, common_attn_metadata, *args, **kwargs)

    return build


def _decodes(builder) -> bool:
    """Whether the bundled kernel decodes for the layers of a metadata builder."""
    from bi_patch.ops.cuda import attention

    problem = attention.Problem(builder.num_heads_q, builder.num_heads_kv, builder.headdim, builder.kv_cache_dtype)
    return attention.serves(problem)


def _schedule(original):
    """FlashAttentionMetadataBuilder._get_scheduler_metadata: tiles are ordered once a step, for one split; not at all
    where the bundled kernel decodes."""

    @functools.wraps(original)
    def _get_scheduler_metadata(self, *, aot_schedule, max_num_splits, **arguments):
        if arguments["max_query_len"] == 1 and _decodes(self):
            return None
        wanted = self.aot_schedule and arguments["causal"] is True
        return original(self, aot_schedule=aot_schedule or wanted, max_num_splits=max_num_splits, **arguments)

    return _get_scheduler_metadata


def _softmax_step(original):
    """softmax_step: a row whose first tile is all masked starts as a row without that tile does."""
    from bi_patch.kernels.triton.softmax import softmax_step

    return softmax_step


def _refuse_pages(config) -> None:
    size = getattr(config.cache_config, "block_size", None)
    if size and size & (size - 1):
        raise UnsupportedFeature(
            f"attention.cuda_pages: with pages of {size} tokens FlashAttention 3 may tile KV by the longest query. Use "
            "--block-size with a power of two, or set BI_PATCH=0"
        )


def _seam(
    name: str,
    module: str,
    qualname: str,
    close,
    why: str,
    how: str,
    causes,
    *,
    releases: str = "",
    required: bool = True,
    until: str = "upstream's compiled and eager code give equal bits at the same speed",
) -> Seam:
    return Seam(
        name=f"attention.cuda_{name}",
        targets=(Target(module, qualname, releases),),
        close=close,
        why=why,
        how=how,
        until=until,
        required=required,
        causes=causes,
    )


SEAMS = (
    Seam(
        name="attention.cuda_backend",
        targets=(Target("vllm.model_executor.layers.attention.attention", "Attention.__init__"),),
        close=_backend,
        why="a backend that splits or tiles KV by the batch changes bits with the batch",
        how="FlashAttention 3 in one split; layers with a window on Triton attention, whose tiles stand at fixed "
        "positions; other backends and head sizes are refused",
        until="never: it is the gate",
        causes=(3, 4, 25),
        serves=("Attention",),
    ),
    _seam(
        "longest_query",
        "vllm.v1.attention.backends.flash_attn",
        "FlashAttentionMetadataBuilder.build",
        _longest_query,
        "FlashAttention 3 cuts KV elsewhere for single queries when heads have 64 elements",
        "a batch that it serves is told a query of 128 tokens at least",
        (25,),
        until="FlashAttention 3 keeps one tile for a head size",
    ),
    _seam(
        "decode",
        "vllm.v1.attention.backends.flash_attn",
        "FlashAttentionImpl.forward",
        _decode,
        "prefill's tile has 192 or 128 rows of queries for the few of a decode",
        "the bundled kernel keeps its order in tiles of 8 or 16 rows, where it is certified",
        (3, 25),
        required=False,
        until="FlashAttention 3 has such a tile",
    ),
    _seam(
        "schedule",
        "vllm.v1.attention.backends.flash_attn",
        "FlashAttentionMetadataBuilder._get_scheduler_metadata",
        _schedule,
        "upstream's mode orders FlashAttention's tiles anew in every layer",
        "ordered once a step for one split, not for the bundled kernel: the order of tiles reaches no sum",
        (3,),
        releases=">=0.32",
        required=False,
    ),
    Seam(
        name="attention.cuda_empty_tiles",
        targets=(
            Target(
                "vllm.v1.attention.ops.triton_attention_helpers",
                "softmax_step",
                "<0.33",
                ("vllm.v1.attention.ops.triton_unified_attention",),
            ),
        ),
        close=_softmax_step,
        why="a row of a window goes on from a maximum of 0 after a tile that is all masked for it, which it has or has "
        "not by its place among the rows of a chunk",
        how="the maximum stays minus infinity until the row has seen a key, as from 0.33 on",
        until="0.32 is no longer supported",
        causes=(4,),
    ),
)

VARIABLES = (
    Variable(
        name="attention.cuda_mla_disable",
        variable="VLLM_MLA_DISABLE",
        value="0",
        why="it runs an MLA model, which is refused, as if it were another",
    ),
)

POLICIES = (
    Policy(
        name="attention.cuda_pages",
        apply=_refuse_pages,
        why="FlashAttention 3 has a tile of KV for pages that it divides, chosen by the longest query",
    ),
)
