"""Quantized experts: a row for each kind that a certified kernel serves, and one for all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bi_patch.platforms import schemes
from bi_patch.platforms.features import quantized_cells as cells
from bi_patch.platforms.features import scheme_kinds as kinds
from bi_patch.platforms.features.model import Feature, row
from bi_patch.platforms.schemes import CHANNEL, TENSOR, TOKEN, Scheme

_GROUPED = ("compressed-tensors", "gptq", "awq")  # methods whose experts vLLM gives to certified kernels


def _blocks(scheme: Scheme) -> bool:
    return scheme.method in ("fp8", "compressed-tensors") and kinds.blocks(scheme)


def _grouped(scheme: Scheme, bits: int) -> bool:
    """Experts of integers in groups, without act-order."""
    known = scheme.method in _GROUPED and kinds.weight_only(scheme, bits)
    return known and not scheme.order and scheme.scale != CHANNEL


def _four_bits(scheme: Scheme) -> bool:
    """4-bit experts that runs on CUDA cover: groups, no zero points, no act-order."""
    return scheme.method in ("compressed-tensors", "gptq") and _grouped(scheme, 4) and not scheme.zeros


def _zeros(scheme: Scheme) -> bool:
    return scheme.method != "gptq" and _grouped(scheme, 4) and scheme.zeros


def _eight_bits(scheme: Scheme) -> bool:
    return _grouped(scheme, 8) and not scheme.zeros


def _channels_made(scheme: Scheme) -> bool:
    """FP8 per channel that vLLM makes while loading."""
    return kinds.fp8(scheme, CHANNEL, TOKEN, online=True)


def _made(scheme: Scheme) -> bool:
    """Other FP8 that vLLM makes while loading."""
    return scheme.online and scheme.weight == "fp8"


def _channels(scheme: Scheme) -> bool:
    return scheme.method == "compressed-tensors" and kinds.fp8(scheme, CHANNEL, TOKEN)


def _by_tensor(scheme: Scheme) -> bool:
    """FP8 experts with one scale each. Activations have the checkpoint's scale, or one for each token."""
    return scheme.method == "fp8" and (kinds.one_scale(scheme) or kinds.fp8(scheme, TENSOR, TENSOR))


def _one_scale_otherwise(scheme: Scheme) -> bool:
    """FP8 experts with one scale each, in checkpoints that no run had."""
    return kinds.one_scale(scheme) or scheme.method == "compressed-tensors" and kinds.fp8(scheme, TENSOR, TOKEN)


_NVFP4 = ("compressed-tensors", "modelopt")  # methods whose experts in NVFP4 get the bundled kernel


def _nvfp4(scheme: Scheme) -> bool:
    return scheme.method in _NVFP4 and kinds.nvfp4(scheme)


def _nvfp4_rows(scheme: Scheme) -> bool:
    """NVFP4 of checkpoints that ask for such activations. On Hopper activations stay in 16 bits."""
    return scheme.method in _NVFP4 and kinds.nvfp4_rows(scheme)


# A scheme is of the first kind that takes it.
_KINDS: tuple[Callable[[Scheme], bool], ...] = (
    _blocks,
    _four_bits,
    kinds.mxfp4,
    _channels,
    _by_tensor,
    _one_scale_otherwise,
    _channels_made,
    _made,
    _zeros,
    _eight_bits,
    _nvfp4,
    _nvfp4_rows,
)


def quantized_experts(kind: Callable[[Scheme], bool] | None) -> Callable[[Any], str]:
    """Words for a model with experts whose schemes are all of one of _KINDS, or of none (None)."""

    def asked(config: Any) -> str:
        used = schemes.of(config)
        found = next((each for each in _KINDS if used and all(map(each, used))), None)
        there = used and getattr(config.model_config, "is_moe", False) and found is kind
        return f"quantized experts ({'; '.join(map(str, used))})" if there else ""

    return asked


def _by_wna16(config: Any) -> str:
    """Words for weights that vLLM's method moe_wna16 loads. Experts get its layout, on the same kernels."""
    used = schemes.of(config)
    known = used and not any(scheme.other for scheme in used)
    named = known and config.model_config.quantization == schemes.WNA16
    return f"moe_wna16 ({'; '.join(map(str, used))})" if named else ""


# Kinds of experts that a run on CUDA had in compiled code.
COMPILED_EXPERTS = (_four_bits, kinds.mxfp4, _blocks, _channels, _by_tensor, _zeros, _eight_bits, _nvfp4, _nvfp4_rows)

_BY_WNA16 = "invariance-2026-11-30-h200-moe-wna16-vllm-0.33.0.json"
_OWN = cells.layers("Qwen3-30B-A3B", how="compiled, beside an eager engine", files=(cells.OWN_EXPERTS,))

EXPERT_ROWS: tuple[Feature, ...] = (
    row(
        "experts in FP8 blocks of 128 x 128",
        **cells.cuda(
            cells.layers(
                "Qwen3-30B-A3B and MiniMax-M2",
                how="compiled and in eager mode; more axes of MiniMax-M2 in eager mode on the kernel before",
                files=(cells.BLOCKS, cells.NINE_AXES, cells.NEW_EAGER),
            )
        ),
        asked=quantized_experts(_blocks),
    ),
    row(
        "experts of 4 bits in groups (GPTQ, compressed-tensors W4A16)",
        **cells.cuda(_OWN),
        asked=quantized_experts(_four_bits),
    ),
    row(
        "experts in FP8 per channel, activations per token (compressed-tensors, as GLM-4.6)",
        **cells.cuda(
            cells.layers(
                "Qwen3-30B-A3B",
                how="compiled and in eager mode",
                files=(cells.WIDE, cells.NINE_AXES),
            )
        ),
        asked=quantized_experts(_channels),
    ),
    row(
        "experts in FP8 with one scale each (method fp8)",
        **cells.cuda(
            cells.layers(
                "Qwen3-30B-A3B",
                how="compiled and in eager mode; static activations compiled: batch size and decode = prefill",
                files=(cells.NEW_EAGER, cells.NEW_GRAPHS, cells.CUT),
            )
        ),
        asked=quantized_experts(_by_tensor),
    ),
    row(
        "experts in FP8 with one scale each (other methods)",
        **cells.cuda(cells.TRIAL),
        asked=quantized_experts(_one_scale_otherwise),
    ),
    row(
        "experts in FP8 made while loading, per channel",
        **cells.cuda(cells.layers("Qwen3-30B-A3B", how="in eager mode", files=(cells.NEW_EAGER,))),
        asked=quantized_experts(_channels_made),
    ),
    row("experts in FP8 made while loading, otherwise", **cells.cuda(cells.TRIAL), asked=quantized_experts(_made)),
    row(
        "experts of 4 bits in groups with zero points (AWQ, compressed-tensors)",
        **cells.cuda(_OWN),
        asked=quantized_experts(_zeros),
    ),
    row(
        "experts of 8 bits in groups, weights alone (GPTQ, compressed-tensors)",
        **cells.cuda(cells.layers("Qwen3-30B-A3B", how="of GPTQ, compiled and in eager mode", files=(cells.EXPERTS,))),
        asked=quantized_experts(_eight_bits),
    ),
    row(
        "experts of AWQ and GPTQ by --quantization moe_wna16",
        **cells.cuda(
            cells.layers("Qwen3-30B-A3B", how="of 4 bits, compiled, beside an eager engine", files=(_BY_WNA16,))
        ),
        asked=_by_wna16,
    ),
    row("experts in MXFP4", **cells.REFUSED | {"cuda": cells.OSS}, asked=quantized_experts(kinds.mxfp4)),
    row(
        "experts in NVFP4, weights alone (compressed-tensors, ModelOpt)",
        **cells.NO_KERNEL | {"cuda": (cells.NVFP4_EXPERTS, cells.NONE)},
        asked=quantized_experts(_nvfp4),
    ),
    row(
        "experts in NVFP4, weights and activations (compressed-tensors, ModelOpt)",
        **cells.NO_KERNEL | {"cuda": (cells.NVFP4_ROWS_EXPERTS, cells.NONE)},
        asked=quantized_experts(_nvfp4_rows),
    ),
    row("quantized experts", **cells.REFUSED, asked=quantized_experts(None)),
)
