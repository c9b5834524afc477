"""Quantized weights: one row for each scheme that a kernel of its own serves, and one for all others.

A checkpoint may have several schemes, and layers without any. Each scheme belongs to one row of _SCHEMES, and the
engine starts if no row that its checkpoint uses is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bi_patch.platforms import schemes
from bi_patch.platforms.features import quantized_cells as cells
from bi_patch.platforms.features import scheme_kinds as kinds
from bi_patch.platforms.features.model import Feature, refused, row, served, untried
from bi_patch.platforms.features.pairs import compiled, one_form, recurrent
from bi_patch.platforms.features.quantized_experts import COMPILED_EXPERTS, EXPERT_ROWS, quantized_experts
from bi_patch.platforms.schemes import CHANNEL, TENSOR, TOKEN, Scheme

# (name, whether a scheme belongs to the row, its cells). A scheme belongs to the first row that takes it.
_SCHEMES: tuple[tuple[str, Callable[[Scheme], bool], cells.Cells], ...] = (
    (
        "AutoRound (INC), 4 bits in the packing of GPTQ",
        kinds.tool("inc", lambda s: kinds.packed(s) and s.weight == "int4" and not s.zeros),
        cells.cuda(cells.layers("Qwen3-8B", files=(cells.NEW_EAGER, cells.NINE_AXES))),
    ),
    ("AutoRound (INC), 8 bits or in the packing of AWQ", kinds.tool("inc", kinds.packed), cells.cuda(cells.TRIAL)),
    (
        "ModelOpt: FP8 per tensor, static activations",
        kinds.tool("modelopt", kinds.one_scale),
        cells.cuda(cells.layers("Qwen3-8B", how=cells.EARLIER_SCALES, files=(cells.NEW_EAGER, cells.NINE_AXES))),
    ),
    (
        "ModelOpt: FP8 per channel or in blocks",
        kinds.tool("modelopt", kinds.by_token, kinds.blocks),
        cells.cuda(cells.TRIAL),
    ),
    (
        "ModelOpt: NVFP4 weights alone",
        kinds.tool("modelopt", kinds.nvfp4),
        cells.NO_KERNEL | {"cuda": cells.NVFP4_MODELOPT},
    ),
    (
        "ModelOpt: NVFP4 weights and activations",
        kinds.tool("modelopt", kinds.nvfp4_rows),
        cells.NO_KERNEL | {"cuda": cells.NVFP4_ROWS},
    ),
    (
        "Quark: FP8 per tensor, static activations",
        kinds.tool("quark", kinds.one_scale),
        cells.cuda(cells.layers("Qwen3-8B", how=cells.EARLIER_SCALES, files=(cells.NEW_EAGER, cells.NINE_AXES))),
    ),
    ("Quark: FP8 per channel", kinds.tool("quark", kinds.static, kinds.by_token), cells.cuda(cells.TRIAL)),
    (
        "Quark: NVFP4 weights and activations",
        kinds.tool("quark", kinds.nvfp4_rows),
        cells.NO_KERNEL | {"cuda": cells.NVFP4_ROWS_QUARK},
    ),
    (
        "INT8 weights and activations (compressed-tensors W8A8)",
        lambda s: kinds.int8(s, TOKEN, static=False),
        cells.ON_CPU | {"cuda": cells.INT8},
    ),
    (
        "INT8 weights, static INT8 activations",
        lambda s: kinds.int8(s, TENSOR, static=True),
        cells.ON_CPU | {"cuda": cells.INT8_STATIC},
    ),
    (
        "AWQ, 4 bits",
        kinds.int4("awq"),
        cells.ON_CPU | {"cuda": cells.four(cells.FOUR_BITS)},
    ),
    (
        "GPTQ, 4 bits",
        kinds.int4("gptq"),
        cells.ON_CPU | {"cuda": cells.four(cells.EAGER)},
    ),
    (
        "compressed-tensors W4A16",
        kinds.int4("compressed-tensors"),
        cells.ON_CPU | {"cuda": cells.four()},
    ),
    (
        "GPTQ and compressed-tensors with act-order",
        lambda s: s.order and (kinds.weight_only(s, 4) or kinds.weight_only(s, 8)),
        cells.NO_KERNEL
        | {
            "cuda": refused(
                "vLLM 0.33 refuses them, and the kernels before have no certified order",
                todo="Use a checkpoint without act-order, or with static act-order",
            )
        },
    ),
    (
        "8-bit weights alone (GPTQ, compressed-tensors W8A16)",
        lambda s: kinds.weight_only(s, 8),
        cells.NO_KERNEL | {"cuda": cells.EIGHT_BITS},
    ),
    (
        "FP8 in blocks of 128 x 128",
        kinds.blocks,
        cells.cuda(cells.layers("Qwen3-8B and MiniMax-M2", files=(cells.H200, cells.NINE_AXES))) | cells.WITH_AMX,
    ),
    (
        "FP8 per channel or tensor, activations per token (compressed-tensors)",
        kinds.by_token,
        cells.cuda(cells.layers("Qwen3-8B", files=(cells.H200, cells.NINE_AXES))),
    ),
    (
        "FP8 per tensor, static activations (method fp8)",
        lambda s: s.method == "fp8" and kinds.fp8(s, TENSOR, TENSOR, static=True),
        cells.REFUSED | {"cuda": cells.STATIC},
    ),
    (
        "FP8 per channel or tensor, static activations (other methods)",
        kinds.static,
        cells.REFUSED | {"cuda": cells.BOTH},
    ),
    (
        "FP8 per tensor, dynamic activations",
        lambda s: kinds.fp8(s, TENSOR, TENSOR),
        cells.cuda(cells.layers("Qwen3-8B")),
    ),
    (
        "FP8 made while loading (--quantization fp8)",
        lambda s: kinds.fp8(s, TENSOR, TENSOR, online=True),
        cells.cuda(cells.COMPILED),
    ),
    (
        "FP8 made while loading, per channel (--quantization fp8_per_channel)",
        lambda s: kinds.fp8(s, CHANNEL, TOKEN, online=True),
        cells.REFUSED | {"cuda": cells.LATER},
    ),
    (
        "FP8 made while loading, in blocks (--quantization fp8_per_block)",
        lambda s: kinds.fp8(s, "128x128", "128", online=True),
        cells.REFUSED
        | {
            "cuda": (
                served(
                    "invariance-2026-11-29-h200-fp8-block-vllm-0.33.0.json",
                    why="two layers of Qwen3-8B's sizes, compiled and in eager mode",
                    releases=">=0.33",
                ),
                cells.NONE,
            )
        },
    ),
    (
        "MXFP4 (gpt-oss as published)",
        kinds.mxfp4,
        cells.NO_KERNEL | {"cuda": cells.OSS},
    ),
    (
        "NVFP4 weights alone (compressed-tensors)",
        kinds.nvfp4,
        cells.NO_KERNEL | {"cuda": cells.NVFP4},
    ),
    (
        "NVFP4 weights and activations (compressed-tensors)",
        kinds.nvfp4_rows,
        cells.NO_KERNEL | {"cuda": cells.NVFP4_ROWS},
    ),
)
_OTHERS = "other quantized weights"
# The rows that the README shows, and its names for them.
_SHORT = {
    "INT8 weights and activations (compressed-tensors W8A8)": "INT8 weights and activations",
    "AWQ, 4 bits": "AWQ",
    "GPTQ, 4 bits": "GPTQ",
    "FP8 in blocks of 128 x 128": "FP8 in blocks",
    "FP8 made while loading (--quantization fp8)": "--quantization fp8",
}


def _row(scheme: Scheme) -> str:
    """The name of the row that a scheme belongs to."""
    taken = () if scheme.other else (name for name, takes, _ in _SCHEMES if takes(scheme))
    return next(iter(taken), _OTHERS)


def _words(used: tuple[Scheme, ...]) -> str:
    return f"quantized weights ({'; '.join(map(str, used))})" if used else ""


def _asked(name: str) -> Callable[[Any], str]:
    return lambda config: _words(tuple(s for s in schemes.of(config) if _row(s) == name))


def _mixed(config: Any) -> str:
    """Words for quantized weights in a model whose attention computes with weights of its own."""
    used, model = schemes.of(config), config.model_config
    kind = "MLA" if getattr(model, "use_mla", False) else "recurrent layers" if recurrent(model) else ""
    if not used or not kind or _latent(config):
        return ""
    return f"quantized weights with {kind} ({'; '.join(map(str, used))})"


def _latent(config: Any) -> str:
    """Words for DeepSeek V3 whose schemes are all FP8 in blocks."""
    used, model = schemes.of(config), config.model_config
    named = "DeepseekV3ForCausalLM" in (getattr(model, "architectures", None) or ())
    there = named and used and getattr(model, "use_mla", False) and all(map(kinds.blocks, used))
    return f"quantized weights with MLA ({'; '.join(map(str, used))})" if there else ""


def _latent_otherwise(config: Any) -> str:
    """The same in a mode that no run has: in one form."""
    return _latent(config) if one_form() else ""


def _compiled(config: Any) -> str:
    used = tuple(s for s in schemes.of(config) if not s.online)
    return f"compiled quantized weights ({'; '.join(map(str, used))})" if used and compiled(config) else ""


# Rows whose schemes a run on CUDA had in compiled code.
_COMPILED_RUNS = (
    "INT8 weights and activations (compressed-tensors W8A8)",
    "INT8 weights, static INT8 activations",
    "AWQ, 4 bits",
    "GPTQ, 4 bits",
    "compressed-tensors W4A16",
    "8-bit weights alone (GPTQ, compressed-tensors W8A16)",
    "FP8 per tensor, static activations (method fp8)",
    "FP8 per channel or tensor, static activations (other methods)",
    "MXFP4 (gpt-oss as published)",
    "NVFP4 weights alone (compressed-tensors)",
    "NVFP4 weights and activations (compressed-tensors)",
    "ModelOpt: NVFP4 weights alone",
    "ModelOpt: NVFP4 weights and activations",
    "Quark: NVFP4 weights and activations",
    "FP8 in blocks of 128 x 128",
    "FP8 per channel or tensor, activations per token (compressed-tensors)",
    "FP8 per tensor, dynamic activations",
    "AutoRound (INC), 4 bits in the packing of GPTQ",
    "ModelOpt: FP8 per tensor, static activations",
    "Quark: FP8 per tensor, static activations",
)


def _compiled_elsewhere(config: Any) -> str:
    """Words for a compiled model with a scheme, or with quantized experts, that ran in eager mode only."""
    used = schemes.of(config)
    experts = getattr(config.model_config, "is_moe", False)
    experts = experts and not any(quantized_experts(kind)(config) for kind in COMPILED_EXPERTS)
    other = experts or any(_row(s) not in _COMPILED_RUNS for s in used if not s.online)
    there = used and other and compiled(config) and not _latent(config)
    return f"compiled quantized weights ({'; '.join(map(str, used))})" if there else ""


def _powers(latent: bool) -> Callable[[Any], str]:
    """Words for scales of powers of two in DeepSeek V3 (latent), or in another model."""

    def asked(config: Any) -> str:
        used = tuple(s for s in schemes.of(config) if s.powers)
        there = used and bool(_latent(config)) == latent
        return f"FP8 blocks with scale_fmt ue8m0 ({'; '.join(map(str, used))})" if there else ""

    return asked


def _head(*methods: str) -> Callable[[Any], str]:
    """Words for a quantized head of one of these methods, or of another than GPTQ."""

    def asked(config: Any) -> str:
        used = tuple(
            s for s in schemes.of(config) if s.head and (s.method in methods if methods else s.method != "gptq")
        )
        return f"a quantized language-model head ({'; '.join(map(str, used))})" if used else ""

    return asked


def _dtype(config: Any) -> str:
    dtype = str(getattr(config.model_config, "dtype", "")).removeprefix("torch.")
    return f"quantized weights in {dtype}" if dtype in ("float16", "float32") and schemes.of(config) else ""


QUANTIZATION: tuple[Feature, ...] = (
    *(row(name, short=_SHORT.get(name, ""), **cells, asked=_asked(name)) for name, _, cells in _SCHEMES),
    *EXPERT_ROWS,
    row(
        "FP8 blocks with scales of powers of two (scale_fmt ue8m0, as in DeepSeek V3.1)",
        cpu=untried("vLLM's CPU build reads no scale_fmt"),
        cuda=(
            served(
                "invariance-2026-11-29-h200-mla-shapes-vllm-0.33.0-2.json",
                why="four layers of DeepSeek-V3's sizes, compiled, beside an FP8 KV cache",
                releases=">=0.33",
            ),
            cells.NONE,
        ),
        ascend=cells.NONE,
        asked=_powers(True),
    ),
    row(
        "FP8 blocks with scales of powers of two, in other models",
        cpu=untried("vLLM's CPU build reads no scale_fmt"),
        cuda=(untried("measured with DeepSeek-V3's sizes", releases=">=0.33"), cells.NONE),
        ascend=cells.NONE,
        asked=_powers(False),
    ),
    row("FP8 blocks of 128 x 128 in DeepSeek V3 (MLA)", **cells.cuda(cells.WITH_MLA), asked=_latent),
    row(
        "FP8 blocks of 128 x 128 in DeepSeek V3 with BI_PATCH_MLA=one",
        **cells.cuda(untried("measured with BI_PATCH_MLA=two", releases=">=0.33")),
        asked=_latent_otherwise,
    ),
    row(
        "other quantized weights in models with MLA or recurrent layers",
        cpu=refused("nobody has examined the two together", todo="Use unquantized weights"),
        cuda=refused("nobody has examined the two together", todo="Use unquantized weights"),
        ascend=cells.NONE,
        asked=_mixed,
    ),
    row("quantized language-model head (GPTQ)", **cells.cuda(cells.layers("Qwen3-8B")), asked=_head("gptq")),
    row("quantized language-model head (other methods)", **cells.cuda(cells.TRIAL), asked=_head()),
    row(
        "quantized weights of a checkpoint, compiled",
        cpu=served(cells.CPU_RUN),
        cuda=served(
            cells.BESIDE,
            cells.NINE_AXES,
            cells.OWN_EXPERTS,
            cells.NEW_GRAPHS,
            cells.OSS_RUN,
            cells.ROWS_GRAPHS,
            cells.EXPERTS,
            why="AWQ, GPTQ, W4A16, W8A16, INT8 and FP8 with static and dynamic activations, NVFP4 "
            "weights, and experts of 4 bits, in MXFP4, in NVFP4 and in FP8",
        ),
        ascend=cells.NONE,
        asked=_compiled,
    ),
    row(
        "quantized weights or experts in another scheme, compiled",
        cpu=served(cells.CPU_RUN, why="each scheme that is served was measured compiled, too"),
        cuda=untried("measured in eager mode"),
        ascend=cells.NONE,
        asked=_compiled_elsewhere,
    ),
    row(
        _OTHERS,
        **cells.REFUSED,
        asked=_asked(_OTHERS),
        details="Each method, group size and packing that no row above names: torchao (a package with "
        "products of its own), MXFP8",
    ),
    row(
        "quantized weights in fp16 or fp32",
        cpu=untried("the evidence of the rows above is in bf16"),
        cuda=untried(),
        ascend=cells.NONE,
        asked=_dtype,
    ),
)
