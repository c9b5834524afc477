"""Seams of attention on CUDA: which backend and tile serves which layer."""

import dataclasses
import functools
import inspect

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import CUDA, Policy, Seam, Target

_FLASH, _TRITON = "FLASH_ATTN", "TRITON_ATTN"
# Heads for which FlashAttention 3 was shown to give equal bits in decode and prefill, whatever the batch.
_FLASH_HEAD_SIZES = (64, 80, 96, 112, 128, 192, 256)
# Told this for its longest query, FlashAttention 3 never takes its tile for single queries, which for heads of up to
# 64 elements cuts KV elsewhere (the tile of one warp group: up to 64 rows of queries times heads of a group).
_LONG_QUERY = 128


def _cuda_backend(original):
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


def _cuda_longest_query(original):
    """FlashAttentionMetadataBuilder.build: with small heads a decode is told a long query and keeps prefill's tile."""

    @functools.wraps(original)
    def build(self, common_prefix_len, common_attn_metadata, *args, **kwargs):
        if self.headdim <= 64 and common_attn_metadata.max_query_len < _LONG_QUERY:
            common_attn_metadata = dataclasses.replace(common_attn_metadata, max_query_len=_LONG_QUERY)
        return original(self, common_prefix_len, common_attn_metadata, *args, **kwargs)

    return build


def _cuda_schedule(original):
    """FlashAttentionMetadataBuilder._get_scheduler_metadata: tiles are ordered once a step, for one split."""

    @functools.wraps(original)
    def _get_scheduler_metadata(self, *, aot_schedule, max_num_splits, **arguments):
        wanted = self.aot_schedule and arguments["causal"] is True
        return original(self, aot_schedule=aot_schedule or wanted, max_num_splits=max_num_splits, **arguments)

    return _get_scheduler_metadata


def _refuse_cuda(config) -> None:
    if config.model_config is not None and config.model_config.use_mla:
        raise UnsupportedFeature(
            "attention.cuda_mla: MLA was not shown to be invariant on CUDA. Use a model without MLA, or set BI_PATCH=0"
        )


def _cuda_seam(name: str, module: str, qualname: str, close, why: str, how: str, causes, *,
               releases: str = ">=0.23,<0.34", required: bool = True,
               until: str = "upstream's compiled and eager code give equal bits at the same speed") -> Seam:
    return Seam(
        name=f"attention.cuda_{name}",
        targets=(Target(module, qualname, releases),),
        close=close,
        why=why,
        how=how,
        until=until,
        platforms=CUDA,
        required=required,
        causes=causes,
    )


SEAMS = (
    Seam(
        name="attention.cuda_backend",
        targets=(Target("vllm.model_executor.layers.attention.attention", "Attention.__init__"),),
        close=_cuda_backend,
        why="a backend that splits or tiles KV by the batch changes bits with the batch",
        how="FlashAttention 3 in one split; layers with a window on Triton attention, whose tiles stand at fixed "
        "positions; other backends and head sizes are refused",
        until="never: it is the gate",
        platforms=CUDA,
        causes=(3, 4, 25),
    ),
    _cuda_seam(
        "longest_query", "vllm.v1.attention.backends.flash_attn", "FlashAttentionMetadataBuilder.build",
        _cuda_longest_query, "FlashAttention 3 cuts KV elsewhere for single queries when heads have 64 elements",
        "it is told a query of 128 tokens at least", (25,),
        until="FlashAttention 3 keeps one tile for a head size",
    ),
    _cuda_seam(
        "schedule", "vllm.v1.attention.backends.flash_attn", "FlashAttentionMetadataBuilder._get_scheduler_metadata",
        _cuda_schedule, "upstream's mode orders FlashAttention's tiles anew in every layer",
        "ordered once a step for one split: the order of tiles reaches no sum", (3,),
        releases=">=0.32,<0.34", required=False,
    ),
)

POLICIES = (
    Policy(
        name="attention.cuda_mla",
        apply=_refuse_cuda,
        why="MLA was not shown to be invariant on CUDA",
        platforms=CUDA,
    ),
)
