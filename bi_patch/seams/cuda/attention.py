"""Seams of attention on CUDA. They choose the backend and the tile for each layer."""

import dataclasses
import functools
import inspect

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.cuda import eighths
from bi_patch.seams.model import Policy, Seam, Target, Variable
from bi_patch.seams.overlay import with_globals

_FLASH, _TRITON = "FLASH_ATTN", "TRITON_ATTN"
# Head sizes for which a test showed that FlashAttention 3 gives decode and prefill equal bits in every batch.
_FLASH_HEAD_SIZES = (64, 80, 96, 112, 128, 192, 256)
# The same for attention in both directions without a cache: a prompt alone, and beside other prompts.
_FLASH_ENCODER_SIZES = (64, 96, 128)
# FlashAttention 3 has a tile for short queries (up to 64 rows: queries times the heads that share a KV head). For heads
# of up to 64 elements, this tile splits KV at other positions. FlashAttention 3 never takes the tile if the longest
# query has 128 tokens.
_LONG_QUERY = 128
_NO_WINDOW = (-1, -1)
ENCODER = "encoder_only"  # over the whole prompt in both directions, without a cache
# The global through which FlashAttentionImpl.forward calls FlashAttention 3: the first name that its module has.
_CALLS = ("_FA4_DENSE_ATTENTION_KERNEL", "flash_attn_varlen_func")


def _backend(original):
    """Attention.__init__: use Triton attention where FlashAttention 3 cannot serve, and refuse other backends."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        held = signature.bind(self, *args, **kwargs)
        if held.arguments.get("attn_type") == ENCODER and not _chosen() and not _flash_encodes(held.arguments):
            held.arguments["attn_backend"] = _encoder_backend()
        if held.arguments.get("attn_backend") is None and not _chosen() and not _flash_serves(held.arguments):
            held.arguments["attn_backend"] = _triton()
        original(*held.args, **held.kwargs)
        _refuse_layer(self, held.arguments)
        if eighth(getattr(self, "kv_cache_dtype", None)):
            # Queries stay in 16 bits, and keys and values are dequantized to their type.
            self.query_quant = None

    return __init__


def _window(arguments) -> int | None:
    """The sliding window that Attention.__init__ will take from its arguments, in tokens."""
    cache = arguments.get("cache_config")
    layers = arguments.get("per_layer_sliding_window")
    return layers if layers is not None or cache is None else cache.sliding_window


def eighth(kv_cache_dtype: str | None) -> bool:
    """Whether a KV cache of this type holds 8-bit floats."""
    return str(kv_cache_dtype).startswith("fp8")


def _cache_kind(arguments) -> str | None:
    """The KV cache that a layer gets, by the engine's arguments or by its checkpoint, as vLLM names it."""
    kind = getattr(arguments.get("cache_config"), "cache_dtype", None)
    asked = getattr(arguments.get("quant_config"), "kv_cache_scheme", None) is not None
    return "fp8" if asked and kind in (None, "auto") else kind


def _flash_serves(arguments) -> bool:
    """Whether FlashAttention 3 would serve the layer that Attention.__init__ makes of its arguments, invariantly."""
    kind = _cache_kind(arguments)
    return (
        _window(arguments) is None
        and arguments["head_size"] in _FLASH_HEAD_SIZES
        and arguments.get("alibi_slopes") is None
        and _flash_version(arguments) == 3
        and (not eighth(kind) or eighths.serves(arguments, kind))
    )


def _flash_version(arguments) -> int | None:
    """The version of FlashAttention that vLLM would take for a layer."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    asked = {
        "head_size": arguments["head_size"],
        "has_sinks": arguments.get("extra_impl_args", {}).get("sinks") is not None,
        "requires_softcap": bool(arguments.get("logits_soft_cap")),
    }
    known = inspect.signature(get_flash_attn_version).parameters
    return get_flash_attn_version(**{name: value for name, value in asked.items() if name in known})


def _chosen() -> bool:
    """Whether the user or a policy named an attention backend."""
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config().attention_config.backend is not None


def _triton():
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    return TritonAttentionBackend


def _flash_encodes(arguments) -> bool:
    """Whether FlashAttention 3 would serve an encoder's layer, invariantly. A window does not matter: every prompt is
    whole, so a query has one place in its tile."""
    return (
        arguments["head_size"] in _FLASH_ENCODER_SIZES
        and arguments.get("alibi_slopes") is None
        and _flash_version(arguments) == 3
    )


def _encoder_backend():
    """The backend of attention in both directions without a cache: Triton attention's tiles start at a prompt's first
    token."""
    from vllm.model_executor.layers.attention.encoder_only_attention import create_encoder_only_attention_backend

    return create_encoder_only_attention_backend(_triton())


def _refuse_layer(layer, arguments) -> None:
    name = layer.attn_backend.get_name()
    reason, cure = "", f"--attention-backend {_TRITON}"
    if name not in (_FLASH, _TRITON):
        reason, cure = f"bi_patch does not cover the {name} backend", f"--attention-backend {_FLASH} or {_TRITON}"
    elif arguments.get("attn_type", "decoder") == ENCODER and name == _FLASH:
        if not _flash_encodes(arguments):
            reason = (
                "no test showed that FlashAttention without a cache is batch-invariant for heads of "
                f"{layer.head_size} elements in this version"
            )
    elif arguments.get("attn_type", "decoder") not in ("decoder", ENCODER):
        reason, cure = f"bi_patch does not cover {arguments['attn_type']} attention", "a decoder-only model"
    elif name == _FLASH:
        version = getattr(layer.impl, "vllm_flash_attn_version", None)
        if version != 3:
            reason = f"no test showed that FlashAttention {version} is batch-invariant, only FlashAttention 3"
        elif layer.sliding_window is not None:
            reason = f"FlashAttention 3 aligns its KV tiles with the query's window (of {layer.sliding_window} tokens)"
        elif layer.head_size not in _FLASH_HEAD_SIZES:
            reason = f"no test showed that FlashAttention 3 is batch-invariant for heads of {layer.head_size} elements"
        elif eighth(kind := getattr(layer, "kv_cache_dtype", None)) and not eighths.serves(arguments, kind):
            reason = "of an FP8 KV cache, FlashAttention 3 adds tiles in pairs, counted from a chunk's last token"
    elif layer.head_size == 256 and _tunes_large_heads():
        reason, cure = f"on this GPU, {name} tiles heads of 256 elements by the query's length", "another GPU"
    if reason:
        raise UnsupportedFeature(f"attention.cuda_backend: {reason}. Use {cure}, or set BI_PATCH=0")


def _tunes_large_heads() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_device_capability_family(100)


def prefill(q, k, v, pages, scale: float):
    """Attention of the prompt q [tokens, heads, D] with the arguments that vLLM gives FlashAttention 3.

    The arguments and the result are those of `attention.Prefill`.
    """
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
    """The decode problem of every layer on FlashAttention 3, with the prefill to which the certificate compares."""
    import torch
    from vllm.model_executor.layers.attention.attention import Attention

    from bi_patch.ops.cuda.attention import Problem

    for layer in config.compilation_config.static_forward_context.values():
        decodes = getattr(layer, "attn_type", "decoder") == "decoder"
        if isinstance(layer, Attention) and decodes and layer.attn_backend.get_name() == _FLASH:
            problem = Problem(layer.num_heads, layer.num_kv_heads, layer.head_size, layer.dtype)
            if eighth(getattr(layer, "kv_cache_dtype", None)):
                yield problem._replace(cache=torch.float8_e4m3fn), eighths.prefill
            else:
                yield problem, prefill


def _decode(original):
    """FlashAttentionImpl.forward: use the bundled kernel, if certified, for single queries and for a few short ones."""
    name = next(name for name in _CALLS if name in original.__globals__)
    return eighths.with_step(with_globals(original, **{name: _decode_or(original.__globals__[name])}))


def _decode_or(flash):
    """What replaces vLLM's FlashAttention 3 function: it calls the bundled kernel if that kernel serves the call."""
    from bi_patch.ops.cuda import attention

    def attend(**given):
        q, k = given["q"], given["k"]
        if k.dtype.itemsize == 1:
            return eighths.attend(flash, _plain(given), **given)
        longest = given["max_seqlen_q"]
        if longest > 1 and not attention.quick(longest, q.shape[0], q.shape[-1], k.shape[2]):
            return flash(**given)
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
                given.get("max_seqlen_k"),
            )
        ):
            return given["out"]
        if q.shape[-1] <= 64:  # vLLM may have made the step's schedule for single queries
            given |= {"max_seqlen_q": _LONG_QUERY, "scheduler_metadata": None}
        return flash(**given)

    return attend


def _problem(q, k):
    from bi_patch.ops.cuda.attention import Problem

    return Problem(q.shape[1], k.shape[2], q.shape[2], q.dtype)


def _plain(given) -> bool:
    """Whether a call of FlashAttention asks for nothing that the bundled kernel lacks."""
    from bi_patch.kernels.cuda import decode

    return (
        given["causal"] is True
        and all(given.get(name) is None for name in ("alibi_slopes", "s_aux", "mask_mod", "dynamic_causal"))
        and not given.get("softcap")
        and tuple(given["window_size"] or _NO_WINDOW) == _NO_WINDOW
        and (given["k"].dtype == given["q"].dtype or str(given["k"].dtype) == "torch.float8_e4m3fn")
        and decode.covers_pages(given["k"].shape[1])
    )


def _longest_query(original):
    """FlashAttentionMetadataBuilder.build: with small heads, report a long query, so that FlashAttention 3 keeps the
    tile of prefill. A decode batch that the bundled kernel serves stays as it is."""

    @functools.wraps(original)
    def build(self, common_prefix_len, common_attn_metadata, *args, **kwargs):
        longest = common_attn_metadata.max_query_len
        reported = reported_query(longest, self.headdim, longest == 1 and _decodes(self))
        if reported != longest:
            common_attn_metadata = dataclasses.replace(common_attn_metadata, max_query_len=reported)
        made = original(self, common_prefix_len, common_attn_metadata, *args, **kwargs)
        if eighths.reads(self) and longest > 1:
            made.bi_patch_step = eighths.step_of(self, common_attn_metadata)
        return made

    return build


def reported_query(longest: int, head_size: int, bundled: bool) -> int:
    """The longest query of a step as FlashAttention 3 hears it. bundled: the bundled kernel serves the step."""
    return max(longest, _LONG_QUERY) if head_size <= 64 and not bundled else longest


def _decodes(builder) -> bool:
    """Whether the bundled kernel serves decode for the layers of a metadata builder."""
    from bi_patch.ops.cuda import attention

    sizes = builder.num_heads_q, builder.num_heads_kv, builder.headdim
    own = eighths.reads(builder)
    return attention.serves(eighths.problem_of(builder) if own else attention.Problem(*sizes, builder.kv_cache_dtype))


def _schedule(original):
    """FlashAttentionMetadataBuilder._get_scheduler_metadata: schedule the tiles once a step instead of once a layer.
    A decode batch that the bundled kernel serves needs no schedule, and an FP8 KV cache makes calls of its own."""

    @functools.wraps(original)
    def _get_scheduler_metadata(self, *, aot_schedule, max_num_splits, **arguments):
        if eighths.reads(self) or (arguments["max_query_len"] == 1 and _decodes(self)):
            return None
        wanted = self.aot_schedule and arguments["causal"] is True
        return original(self, aot_schedule=aot_schedule or wanted, max_num_splits=max_num_splits, **arguments)

    return _get_scheduler_metadata


def _softmax_step(original):
    """softmax_step: a fully masked first tile leaves a row's running maximum at minus infinity."""
    from bi_patch.kernels.triton.softmax import softmax_step

    return softmax_step


def _alibi(original):
    """apply_alibi_to_score: count the distance from the query, wherever the query's chunk starts."""
    from bi_patch.kernels.triton.alibi import apply_alibi_to_score

    return apply_alibi_to_score


def _triton_without_flash(config) -> None:
    """Choose Triton attention on GPUs for which vLLM has no FlashAttention 3, unless the user named a backend."""
    from vllm.platforms import current_platform

    held = getattr(config, "attention_config", None)
    if held is None or held.backend is not None or not current_platform.is_cuda():
        return
    if not current_platform.is_device_capability_family(90):
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        held.backend = AttentionBackendEnum.TRITON_ATTN


def _refuse_pages(config) -> None:
    size = getattr(config.cache_config, "block_size", None)
    if size and size & (size - 1):
        raise UnsupportedFeature(
            f"attention.cuda_pages: with pages of {size} tokens, the longest query may decide FlashAttention 3's KV "
            "tile. Use --block-size with a power of two, or set BI_PATCH=0"
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
    until: str,
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
        why="a backend whose split or tile of KV depends on the batch gives bits that depend on the batch",
        how="FlashAttention 3 runs in one split. Layers that it cannot serve, e.g. layers with a sliding window or "
        "ALiBi, run on Triton attention, whose KV tiles start at fixed positions. bi_patch refuses other backends",
        until="never: bi_patch itself decides here which backends it accepts",
        causes=(3, 4, 25),
        serves=("Attention",),
    ),
    _seam(
        "longest_query",
        "vllm.v1.attention.backends.flash_attn",
        "FlashAttentionMetadataBuilder.build",
        _longest_query,
        "with heads of up to 64 elements, FlashAttention 3 has a tile for short queries, and this tile splits KV at "
        "other positions. The longest query of the batch decides which tile serves all requests",
        "bi_patch reports a longest query of at least 128 tokens to FlashAttention 3, so that FlashAttention 3 always "
        "takes prefill's tile",
        (25,),
        until="FlashAttention 3 uses one KV tile per head size (https://github.com/vllm-project/vllm/issues/51902)",
    ),
    _seam(
        "decode",
        "vllm.v1.attention.backends.flash_attn",
        "FlashAttentionImpl.forward",
        _decode,
        "in decode, prefill's tile of 128 or 192 rows is almost empty, because a decode step has few query rows",
        "if certified, the bundled kernel computes decode in tiles of 8 or 16 rows and adds in the order of prefill. "
        "With an FP8 KV cache, FlashAttention 3 runs over a copy of the step's pages in 16 bits",
        (3, 25),
        required=False,
        until="FlashAttention 3 has a small tile with the KV split of prefill",
    ),
    _seam(
        "schedule",
        "vllm.v1.attention.backends.flash_attn",
        "FlashAttentionMetadataBuilder._get_scheduler_metadata",
        _schedule,
        "upstream's mode schedules FlashAttention's tiles in every layer, which costs time",
        "vLLM makes the schedule once a step, for one split. The schedule does not change any sum. Steps that the "
        "bundled decode kernel serves need none",
        (3,),
        releases=">=0.32",
        required=False,
        until="upstream's batch-invariant mode schedules FlashAttention's tiles once a step",
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
        why="with a sliding window, a query row whose first KV tile is fully masked restarts its running maximum at 0 "
        "instead of minus infinity; whether that happens depends on the row's position in its chunk",
        how="the running maximum stays at minus infinity until the row has seen a key, as in vLLM 0.33",
        until="bi_patch no longer supports vLLM 0.32",
        causes=(4,),
    ),
    Seam(
        name="attention.cuda_alibi",
        targets=(
            Target(
                "vllm.v1.attention.ops.triton_attention_helpers",
                "apply_alibi_to_score",
                copies=("vllm.v1.attention.ops.triton_unified_attention",),
            ),
        ),
        close=_alibi,
        why="Triton attention counts ALiBi's distances from the first token of a chunk. So a row's scores round in "
        "another way in another chunk",
        how="distances are counted from the query's own position",
        until="upstream's Triton attention counts distances from the query",
        causes=(6,),
    ),
)

VARIABLES = (
    Variable(
        name="attention.cuda_mla_disable",
        variable="VLLM_MLA_DISABLE",
        value="0",
        why="VLLM_MLA_DISABLE=1 runs an MLA model as an ordinary model, which nobody measured",
    ),
)

POLICIES = (
    Policy(
        name="attention.cuda_card",
        apply=_triton_without_flash,
        why="only on Hopper GPUs, vLLM uses FlashAttention 3, whose order bi_patch knows. Elsewhere Triton attention "
        "serves",
    ),
    Policy(
        name="attention.cuda_pages",
        apply=_refuse_pages,
        why="for some page sizes, FlashAttention 3 has a second KV tile, and the longest query decides which tile it "
        "uses",
    ),
)
