"""Keys and values: types and pages of the cache, and where else an engine keeps them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bi_patch.platforms import schemes
from bi_patch.platforms.features.model import Feature, refused, row, served, untried
from bi_patch.platforms.features.questions import NO_SEAM, everywhere

_CPU = "invariance-2026-11-22-cpu-vllm-0.32.0.json"


_CACHES = {"cpu": ("auto", "bfloat16", "float16", "float32"), "cuda": ("auto", "bfloat16", "float16")}


def _to_host(transfer: Any) -> bool:
    """Whether a KVTransferConfig keeps keys and values in memory of the engine's own process, and nowhere else."""
    extra = getattr(transfer, "kv_connector_extra_config", None) or {}
    return (
        getattr(transfer, "kv_connector", None) in ("OffloadingConnector", "SimpleCPUOffloadConnector")
        and getattr(transfer, "kv_connector_module_path", None) is None
        and extra.get("spec_name", "CPUOffloadingSpec") == "CPUOffloadingSpec"
        and extra.get("kv_offload_backend", "cpu") == "cpu"
        and not extra.get("disk_path")
    )


def _transfer(to_host: bool) -> Callable[[Any], str]:
    def asked(config: Any) -> str:
        transfer = config.kv_transfer_config
        if transfer is None or _to_host(transfer) != to_host:
            return ""
        return f"{'KV offload' if to_host else 'KV transfer'} ({getattr(transfer, 'kv_connector', None)})"

    return asked


# With "auto", a checkpoint may choose FP8.
_PLAIN = "Use --kv-cache-dtype bfloat16 or float16, the model's own type"
_EIGHTH_CACHES = ("fp8", "fp8_e4m3")


def _quantized_cache(config: Any) -> str:
    kind = getattr(config.cache_config, "cache_dtype", "auto")
    return "" if kind in (*_CACHES["cpu"], *_EIGHTH_CACHES) else f"a {kind!r} KV cache"


def _eighth_cache(config: Any) -> str:
    kind = getattr(config.cache_config, "cache_dtype", "auto")
    if kind == "auto" and schemes.caches(config):
        return "the checkpoint's FP8 KV cache"
    return f"a {kind!r} KV cache" if kind in _EIGHTH_CACHES else ""


def _fp32_cache(config: Any) -> str:
    return "a 'float32' KV cache" if getattr(config.cache_config, "cache_dtype", "auto") == "float32" else ""


CACHES: tuple[Feature, ...] = (
    row(
        "KV offload to the engine's own memory (OffloadingConnector, SimpleCPUOffloadConnector)",
        cpu=refused("vLLM offloads from GPUs only"),
        cuda=(
            refused("prompt logprobs of offloaded positions are lost", releases="<0.32"),
            served(
                "invariance-2026-11-30-h200-features-vllm-0.33.0.json",
                why="a small Qwen3, in eager mode and compiled; prompts that left the GPU's cache and came back",
            ),
        ),
        ascend=refused(NO_SEAM),
        asked=_transfer(True),
    ),
    row(
        "KV transfer between engines, and stores outside of the engine (NIXL, LMCache, Mooncake, files)",
        **everywhere(
            "the keys of its store tell neither which code computed the keys and values nor from which weights",
            "Use OffloadingConnector without tiers",
        ),
        asked=_transfer(False),
    ),
    row(
        "FP8 KV cache (e4m3, static scales)",
        **everywhere("bi_patch has no certificate for its attention", _PLAIN)
        | {
            "cuda": (
                served(
                    "invariance-2026-11-30-h200-eighths-vllm-0.33.0-2.json",
                    "invariance-2026-11-30-h200-kv-heads-vllm-0.33.0-3.json",
                    why="two layers of Qwen3-8B's sizes, compiled and in eager mode; with scales of each key head, too",
                    releases=">=0.33",
                ),
                refused("bi_patch has no certificate for its attention", todo=_PLAIN),
            )
        },
        asked=_eighth_cache,
    ),
    row(
        "other quantized KV caches",
        **everywhere("bi_patch has no certificate for its attention", "Use --kv-cache-dtype auto"),
        asked=_quantized_cache,
    ),
    row(
        "fp32 KV cache",
        cpu=served(_CPU),
        cuda=refused("no attention kernel serves it", todo="Use --kv-cache-dtype auto"),
        ascend=refused("no attention kernel serves it", todo="Use --kv-cache-dtype auto"),
        asked=_fp32_cache,
    ),
    row(
        "KV cache pages whose number of tokens is no power of two (--block-size)",
        cpu=untried(),
        cuda=refused(
            "the longest query may decide FlashAttention 3's KV tile",
            todo="Use a power of two",
            by="attention.cuda_pages",
        ),
        ascend=refused(
            "the kernels need pages of a multiple of 128 tokens",
            todo="Use --block-size 128",
            by="attention.ascend_block_size",
        ),
    ),
)
