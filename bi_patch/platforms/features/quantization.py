"""Quantized weights: one row for each scheme that a kernel of its own serves, and one for all others.

A checkpoint may have several schemes, and layers without any. Each scheme belongs to one row of _SCHEMES, and the
engine starts if no row that its checkpoint uses is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bi_patch.platforms import schemes
from bi_patch.platforms.features.model import Cell, Feature, refused, row, served, untried
from bi_patch.platforms.features.pairs import compiled, one_form, recurrent
from bi_patch.platforms.schemes import CHANNEL, TENSOR, TOKEN, Scheme

_NONE = refused("bi_patch has no certified order for their products", todo="Use unquantized weights")
_REFUSED = {"cpu": _NONE, "cuda": _NONE, "ascend": _NONE}
_NO_KERNEL = _REFUSED | {"cpu": refused("vLLM's CPU build has no kernel for them", todo="Use unquantized weights")}
_H200 = "invariance-2026-11-28-h200-fp8-vllm-0.33.0.json"
_WITH_MLA = served(
    "invariance-2026-11-29-h200-mla-blocks-compiled-vllm-0.33.0.json",
    "invariance-2026-11-29-h200-mla-two-compiled-vllm-0.33.0.json",
    why="four layers of DeepSeek-V3's sizes, compiled and in eager mode",
    releases=">=0.33",
)
_COMPILED = served(_H200, why="two layers of published sizes, compiled and in eager mode", releases=">=0.33")
_TRIAL = untried("nobody has compared an engine's bits yet", releases=">=0.33")
_NEW_EAGER = "invariance-2026-11-30-h200-quantized-vllm-0.33.0.json"
_NEW_GRAPHS = "invariance-2026-11-30-h200-quantized-vllm-0.33.0-2.json"
_AXES = "invariance-2026-11-30-h200-quantized-vllm-0.33.0-3.json"


def _layers(sizes: str, *, how: str = "compiled and in eager mode", files: tuple[str, ...] = ()) -> Cell:
    """Two layers of a model's sizes. how: the modes."""
    return served(*(files or (_NEW_EAGER, _NEW_GRAPHS)), why=f"two layers of {sizes}'s sizes, {how}", releases=">=0.33")


_RUN = "invariance-2026-11-29-h200-quantized-vllm-0.33.0.json"
_PACKED = (served(_RUN, why="two layers of Qwen3-8B's sizes, compiled and in eager mode", releases=">=0.33"), _NONE)
_FOUR_BITS = "invariance-2026-11-29-h200-four-bits-vllm-0.33.0.json"
_EAGER = "invariance-2026-11-29-h200-quantized-vllm-0.33.0-5.json"
_GRAPHS = "invariance-2026-11-29-h200-quantized-vllm-0.33.0-6.json"


def _four(*files: str, now: str) -> tuple[Cell, ...]:
    """4-bit weights. now: what ran on the kernels of today."""
    why = f"two layers of Qwen3-8B's sizes, compiled and in eager mode; {now}"
    return served(*files, _RUN, why=why, releases=">=0.33"), _NONE


_LATER = (
    served(
        "invariance-2026-11-29-h200-quantized-vllm-0.33.0-2.json",
        why="two layers of Qwen3-8B's sizes, compiled and in eager mode",
        releases=">=0.33",
    ),
    _NONE,
)
_INT8_STATIC = (
    served(
        "invariance-2026-11-29-h200-quantized-vllm-0.33.0-4.json",
        why="two layers of Qwen3-8B's sizes, in eager mode",
        releases=">=0.33",
    ),
    _NONE,
)
_EXPERTS = (
    served(
        _FOUR_BITS,
        _EAGER,
        _GRAPHS,
        why="two layers of Qwen3-30B-A3B's sizes, compiled and in eager mode",
        releases=">=0.33",
    ),
    _NONE,
)
_OSS = (
    served(_FOUR_BITS, _GRAPHS, why="two layers of gpt-oss-20b's sizes, compiled and in eager mode", releases=">=0.33"),
    _NONE,
)
_BOTH = (
    served(_EAGER, _GRAPHS, why="two layers of Qwen3-8B's sizes, compiled and in eager mode", releases=">=0.33"),
    _NONE,
)
_GROUPS = ("32", "64", "128", CHANNEL)  # sizes with a kernel

Cells = dict[str, Cell | tuple[Cell, ...]]


def _cuda(cell: Cell) -> Cells:
    """Refused, except on CUDA in the releases of a cell."""
    return _REFUSED | {"cuda": (cell, _NONE)}


def _weight_only(scheme: Scheme, bits: int) -> bool:
    return scheme.weight == f"int{bits}" and scheme.scale in _GROUPS and not scheme.activation and not scheme.online


_CPU_RUN = "invariance-2026-11-28-cpu-amx-quantized-vllm-0.32.0.json"
_ON_CPU = _REFUSED | {
    "cpu": served(
        _CPU_RUN,
        why="tiny models with random weights, on a CPU with AMX; without AMX other kernels run, which the tests cover",
    )
}
_WITH_AMX: Cells = {"cpu": served(_CPU_RUN, why="tiny models with random weights; vLLM needs AMX for it")}


def _int4(method: str) -> Callable[[Scheme], bool]:
    """4-bit weights of one method, whose groups are in order, with the zero points that its checkpoints have."""
    zeros = {"awq": (True,), "gptq": (False,)}.get(method, (True, False))
    return lambda s: s.method == method and _weight_only(s, 4) and not s.order and s.zeros in zeros


def _int8(scheme: Scheme, activation: str, *, static: bool) -> bool:
    """INT8 weights, and INT8 activations whose scale belongs to the token (not static) or to the checkpoint."""
    return (
        scheme.weight == "int8"
        and scheme.scale in (CHANNEL, TENSOR)
        and not (scheme.zeros or scheme.order)
        and (scheme.activation, scheme.activation_scale, scheme.static) == ("int8", activation, static)
    )


def _fp8(scheme: Scheme, scale: str, activation: str, *, static: bool = False, online: bool = False) -> bool:
    kind = (scheme.weight, scheme.scale, scheme.activation, scheme.activation_scale, scheme.static, scheme.online)
    return kind == ("fp8", scale, "fp8", activation, static, online)


def _blocks(scheme: Scheme) -> bool:
    return _fp8(scheme, "128x128", "128")


def _mxfp4(scheme: Scheme) -> bool:
    return scheme.weight == "mxfp4"


def _nvfp4(scheme: Scheme) -> bool:
    kind = (scheme.weight, scheme.scale, scheme.activation, scheme.zeros, scheme.order)
    return kind == ("nvfp4", "16", "", False, False)


def _by_token(scheme: Scheme) -> bool:
    return any(_fp8(scheme, scale, TOKEN) for scale in (CHANNEL, TENSOR))


def _static(scheme: Scheme) -> bool:
    return any(_fp8(scheme, scale, TENSOR, static=True) for scale in (CHANNEL, TENSOR))


def _one_scale(scheme: Scheme) -> bool:
    return _fp8(scheme, TENSOR, TENSOR, static=True)


def _tool(method: str, *kinds: Callable[[Scheme], bool]) -> Callable[[Scheme], bool]:
    """Schemes of one tool's checkpoints that land on layers with a route."""
    return lambda s: s.method == method and any(kind(s) for kind in kinds)


def _packed(scheme: Scheme) -> bool:
    return (_weight_only(scheme, 4) or _weight_only(scheme, 8) and not scheme.zeros) and not scheme.order


# (name, whether a scheme belongs to the row, its cells). A scheme belongs to the first row that takes it.
_SCHEMES: tuple[tuple[str, Callable[[Scheme], bool], Cells], ...] = (
    (
        "AutoRound (INC), 4 bits in the packing of GPTQ",
        _tool("inc", lambda s: _packed(s) and s.weight == "int4" and not s.zeros),
        _cuda(_layers("Qwen3-8B")),
    ),
    ("AutoRound (INC), 8 bits or in the packing of AWQ", _tool("inc", _packed), _cuda(_TRIAL)),
    ("ModelOpt: FP8 per tensor, static activations", _tool("modelopt", _one_scale), _cuda(_layers("Qwen3-8B"))),
    (
        "ModelOpt: FP8 per channel or in blocks, NVFP4 weights alone",
        _tool("modelopt", _by_token, _blocks, _nvfp4),
        _cuda(_TRIAL),
    ),
    ("Quark: FP8 per tensor, static activations", _tool("quark", _one_scale), _cuda(_layers("Qwen3-8B"))),
    ("Quark: FP8 per channel", _tool("quark", _static, _by_token), _cuda(_TRIAL)),
    (
        "INT8 weights and activations (compressed-tensors W8A8)",
        lambda s: _int8(s, TOKEN, static=False),
        _ON_CPU | {"cuda": _PACKED},
    ),
    (
        "INT8 weights, static INT8 activations",
        lambda s: _int8(s, TENSOR, static=True),
        _ON_CPU | {"cuda": _INT8_STATIC},
    ),
    ("AWQ, 4 bits", _int4("awq"), _ON_CPU | {"cuda": _four(_FOUR_BITS, _AXES, now="on the kernels of today both")}),
    (
        "GPTQ, 4 bits",
        _int4("gptq"),
        _ON_CPU | {"cuda": _four(_EAGER, _GRAPHS, _AXES, now="on the kernels of today both")},
    ),
    (
        "compressed-tensors W4A16",
        _int4("compressed-tensors"),
        _ON_CPU | {"cuda": _four(_FOUR_BITS, now="on the kernels of today both")},
    ),
    (
        "GPTQ and compressed-tensors with act-order",
        lambda s: s.order and (_weight_only(s, 4) or _weight_only(s, 8)),
        _NO_KERNEL
        | {
            "cuda": refused(
                "vLLM 0.33 refuses them, and the kernels before have no certified order",
                todo="Use a checkpoint without act-order, or with static act-order",
            )
        },
    ),
    (
        "8-bit weights alone (GPTQ, compressed-tensors W8A16)",
        lambda s: _weight_only(s, 8),
        _NO_KERNEL | {"cuda": _LATER},
    ),
    (
        "FP8 in blocks of 128 x 128",
        _blocks,
        _cuda(_layers("Qwen3-8B and MiniMax-M2", files=(_H200, _NEW_GRAPHS, _AXES))) | _WITH_AMX,
    ),
    (
        "FP8 per channel or tensor, activations per token (compressed-tensors)",
        _by_token,
        _cuda(_layers("Qwen3-8B", files=(_H200, _AXES))),
    ),
    (
        "FP8 per tensor, static activations (method fp8)",
        lambda s: s.method == "fp8" and _fp8(s, TENSOR, TENSOR, static=True),
        _REFUSED | {"cuda": _PACKED},
    ),
    (
        "FP8 per channel or tensor, static activations (other methods)",
        _static,
        _REFUSED | {"cuda": _BOTH},
    ),
    ("FP8 per tensor, dynamic activations", lambda s: _fp8(s, TENSOR, TENSOR), _cuda(_layers("Qwen3-8B"))),
    ("FP8 made while loading (--quantization fp8)", lambda s: _fp8(s, TENSOR, TENSOR, online=True), _cuda(_COMPILED)),
    (
        "FP8 made while loading, per channel (--quantization fp8_per_channel)",
        lambda s: _fp8(s, CHANNEL, TOKEN, online=True),
        _REFUSED | {"cuda": _LATER},
    ),
    (
        "FP8 made while loading, in blocks (--quantization fp8_per_block)",
        lambda s: _fp8(s, "128x128", "128", online=True),
        _REFUSED
        | {
            "cuda": (
                served(
                    "invariance-2026-11-29-h200-fp8-block-vllm-0.33.0.json",
                    why="two layers of Qwen3-8B's sizes, compiled and in eager mode",
                    releases=">=0.33",
                ),
                _NONE,
            )
        },
    ),
    (
        "MXFP4 (gpt-oss as published)",
        _mxfp4,
        _NO_KERNEL | {"cuda": _OSS},
    ),
    (
        "NVFP4 weights alone (compressed-tensors)",
        _nvfp4,
        _NO_KERNEL | {"cuda": _BOTH},
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


_GROUPED = ("compressed-tensors", "gptq", "awq")  # methods whose experts vLLM gives to certified kernels


def _grouped(scheme: Scheme, bits: int) -> bool:
    """Experts of integers in groups, without act-order."""
    known = scheme.method in _GROUPED and _weight_only(scheme, bits)
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
    return _fp8(scheme, CHANNEL, TOKEN, online=True)


def _made(scheme: Scheme) -> bool:
    """Other FP8 that vLLM makes while loading."""
    return scheme.online and scheme.weight == "fp8"


def _channels(scheme: Scheme) -> bool:
    return scheme.method == "compressed-tensors" and _by_token(scheme)


def _by_tensor(scheme: Scheme) -> bool:
    """FP8 experts with one scale each. Activations have the checkpoint's scale, or one for each token."""
    return scheme.method == "fp8" and (_one_scale(scheme) or _fp8(scheme, TENSOR, TENSOR))


_KINDS = (
    *(_blocks, _four_bits, _mxfp4, _channels, _by_tensor, _one_scale, _channels_made, _made, _zeros, _eight_bits),
)


def _experts(kind: Callable[[Scheme], bool] | None) -> Callable[[Any], str]:
    """Words for a model with experts whose schemes are all of one of _KINDS, or of none (None)."""

    def asked(config: Any) -> str:
        used = schemes.of(config)
        found = next((each for each in _KINDS if used and all(map(each, used))), None)
        there = used and getattr(config.model_config, "is_moe", False) and found is kind
        return f"quantized experts ({'; '.join(map(str, used))})" if there else ""

    return asked


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
    there = named and used and getattr(model, "use_mla", False) and all(map(_blocks, used))
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
    "AWQ, 4 bits",
    "GPTQ, 4 bits",
    "compressed-tensors W4A16",
    "8-bit weights alone (GPTQ, compressed-tensors W8A16)",
    "FP8 per tensor, static activations (method fp8)",
    "FP8 per channel or tensor, static activations (other methods)",
    "MXFP4 (gpt-oss as published)",
    "NVFP4 weights alone (compressed-tensors)",
    "FP8 in blocks of 128 x 128",
    "FP8 per channel or tensor, activations per token (compressed-tensors)",
    "FP8 per tensor, dynamic activations",
    "AutoRound (INC), 4 bits in the packing of GPTQ",
    "ModelOpt: FP8 per tensor, static activations",
    "Quark: FP8 per tensor, static activations",
)
_COMPILED_EXPERTS = (_four_bits, _mxfp4, _blocks, _channels, _by_tensor, _zeros)


def _compiled_elsewhere(config: Any) -> str:
    """Words for a compiled model with a scheme, or with quantized experts, that ran in eager mode only."""
    experts = getattr(config.model_config, "is_moe", False)
    experts = experts and not any(_experts(kind)(config) for kind in _COMPILED_EXPERTS)
    other = experts or any(_row(s) not in _COMPILED_RUNS for s in schemes.of(config))
    return _compiled(config) if other and not _latent(config) else ""


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
    row(
        "experts in FP8 blocks of 128 x 128",
        **_cuda(_layers("Qwen3-30B-A3B and MiniMax-M2", files=(_H200, _NEW_EAGER, _NEW_GRAPHS))),
        asked=_experts(_blocks),
    ),
    row(
        "experts of 4 bits in groups (GPTQ, compressed-tensors W4A16)",
        **_REFUSED | {"cuda": _EXPERTS},
        asked=_experts(_four_bits),
    ),
    row(
        "experts in FP8 per channel, activations per token (compressed-tensors, as GLM-4.6)",
        **_cuda(_layers("Qwen3-30B-A3B")),
        asked=_experts(_channels),
    ),
    row(
        "experts in FP8 with one scale each (method fp8)",
        **_cuda(_layers("Qwen3-30B-A3B", how="compiled and in eager mode; with static activations in eager mode")),
        asked=_experts(_by_tensor),
    ),
    row("experts in FP8 with one scale each (other methods)", **_cuda(_TRIAL), asked=_experts(_one_scale)),
    row(
        "experts in FP8 made while loading, per channel",
        **_cuda(_layers("Qwen3-30B-A3B", how="in eager mode", files=(_NEW_EAGER,))),
        asked=_experts(_channels_made),
    ),
    row("experts in FP8 made while loading, otherwise", **_cuda(_TRIAL), asked=_experts(_made)),
    row(
        "experts of 4 bits in groups with zero points (AWQ, compressed-tensors)",
        **_cuda(
            _layers(
                "Qwen3-30B-A3B",
                how="AWQ compiled and in eager mode, without the package humming-kernels; compressed-tensors in eager "
                "mode",
            )
        ),
        asked=_experts(_zeros),
    ),
    row(
        "experts of 8 bits in groups, weights alone (GPTQ, compressed-tensors)",
        **_cuda(_TRIAL),
        asked=_experts(_eight_bits),
    ),
    row("experts in MXFP4", **_REFUSED | {"cuda": _OSS}, asked=_experts(_mxfp4)),
    row("quantized experts", **_REFUSED, asked=_experts(None)),
    row(
        "FP8 blocks with scales of powers of two (scale_fmt ue8m0, as in DeepSeek V3.1)",
        cpu=untried("vLLM's CPU build reads no scale_fmt"),
        cuda=(
            served(
                "invariance-2026-11-29-h200-mla-shapes-vllm-0.33.0-2.json",
                why="four layers of DeepSeek-V3's sizes, compiled, beside an FP8 KV cache",
                releases=">=0.33",
            ),
            _NONE,
        ),
        ascend=_NONE,
        asked=_powers(True),
    ),
    row(
        "FP8 blocks with scales of powers of two, in other models",
        cpu=untried("vLLM's CPU build reads no scale_fmt"),
        cuda=(untried("measured with DeepSeek-V3's sizes", releases=">=0.33"), _NONE),
        ascend=_NONE,
        asked=_powers(False),
    ),
    row("FP8 blocks of 128 x 128 in DeepSeek V3 (MLA)", **_cuda(_WITH_MLA), asked=_latent),
    row(
        "FP8 blocks of 128 x 128 in DeepSeek V3 with BI_PATCH_MLA=one",
        **_cuda(untried("measured with BI_PATCH_MLA=two", releases=">=0.33")),
        asked=_latent_otherwise,
    ),
    row(
        "other quantized weights in models with MLA or recurrent layers",
        cpu=refused("nobody has examined the two together", todo="Use unquantized weights"),
        cuda=refused("nobody has examined the two together", todo="Use unquantized weights"),
        ascend=_NONE,
        asked=_mixed,
    ),
    row("quantized language-model head (GPTQ)", **_cuda(_layers("Qwen3-8B")), asked=_head("gptq")),
    row("quantized language-model head (other methods)", **_cuda(_TRIAL), asked=_head()),
    row(
        "quantized weights of a checkpoint, compiled",
        cpu=served(_CPU_RUN),
        cuda=served(
            _RUN,
            "invariance-2026-11-29-h200-quantized-vllm-0.33.0-2.json",
            _GRAPHS,
            _NEW_GRAPHS,
            _AXES,
            why="AWQ, GPTQ, W4A16, W8A16, INT8 with dynamic and FP8 with static and dynamic activations, NVFP4 "
            "weights, and experts of 4 bits, in MXFP4 and in FP8",
        ),
        ascend=_NONE,
        asked=_compiled,
    ),
    row(
        "quantized weights of a checkpoint in another scheme, compiled",
        cpu=served(_CPU_RUN, why="each scheme that is served was measured compiled, too"),
        cuda=untried("measured in eager mode"),
        ascend=_NONE,
        asked=_compiled_elsewhere,
    ),
    row(
        _OTHERS,
        **_REFUSED,
        asked=_asked(_OTHERS),
        details="Each method, group size and packing that no row above names: torchao (a package with "
        "products of its own), MXFP8, activations in NVFP4",
    ),
    row(
        "quantized weights in fp16 or fp32",
        cpu=untried("the evidence of the rows above is in bf16"),
        cuda=untried(),
        ascend=_NONE,
        asked=_dtype,
    ),
)
