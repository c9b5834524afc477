"""PyTorch's pointwise operators on CPU whose vector code and scalar code round differently, by one bundled kernel.

PyTorch cuts a tensor among threads and computes the last elements of each part by scalar code. So the numbers of rows
and threads decide which elements are computed by which code. In vector and in scalar code, the operators of `_EQUAL`
give equal bits; sigmoid, silu, gelu and softplus do not, nor does rsqrt of 16-bit numbers. The bundled kernels compute
all elements by the same code. PyTorch's own kernels serve fp64, integers and complex numbers. Other operators have such
a tail, too (exp2, sinh, cosh, atanh, atan2, logaddexp, most powers, elu, selu, celu, mish): no model of vLLM calls them
on rows but as an activation module, which has a certificate of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from bi_patch.errors import UnsupportedFeature
from bi_patch.ops import casts, overrides

_library: list[torch.library.Library] = []
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def override() -> None:
    """Register the overrides below for CPU tensors. A second call does nothing."""
    if not _library:
        _library.append(overrides.register(_OVERRIDES, "CPU"))


def keep_whole() -> None:
    """Let Inductor call these operators and LayerNorm instead of compiling code of its own for them. A second call does
    nothing.

    Inductor's own code has a tail like PyTorch's on instruction sets without masks, and other values than eager code:
    models that vLLM takes from transformers compute rotations and activations with sin, cos, tanh and erf, and scales
    of attention by position (Llama 4, Ministral 3) are logarithms. Inductor also rounds 16-bit results after every
    operation from then on, as eager code does. So compiled code has the bits of eager code, but for sums over a row.

    Raises UnsupportedFeature if Inductor would still take one of the operators apart.
    """
    if _undo:
        return
    from torch._inductor import decomposition, lowering

    aten = torch.ops.aten
    whole = (*_ROWS, *(getattr(aten, name).default for name in (*_BUNDLED, *_EQUAL)))
    # Inductor keeps a copy of its table from its first compilation on, which may be older than this call.
    _undo.append(decomposition.fast_random_decomps.cache_clear)
    for held in (decomposition.decompositions, lowering.lowerings):
        _undo.append(functools.partial(_put_back, held, {op: held.get(op) for op in whole}))
    for marked in (lowering.fallbacks, lowering.needs_realized_inputs):
        new = [op for op in whole if op not in marked]
        _undo.append(functools.partial(marked.difference_update, new))
    for op in whole:
        decomposition.decompositions.pop(op, None)
        lowering.make_fallback(op, warn=False, override_decomp=True)
    decomposition.fast_random_decomps.cache_clear()
    _undo.append(casts.Hold().release)
    before = torch.compiler.config.cache_key_tag
    # Code from before these calls is never loaded. The tag comes last: another thread may be compiling meanwhile.
    _set(torch.compiler.config, "cache_key_tag", f"{before}; {_TAG}" if before else _TAG)
    if left := [op.name() for op in whole if op in decomposition.select_decomp_table()]:
        restore()
        raise UnsupportedFeature(
            f"compile.cpu_whole: this PyTorch's compiler takes {', '.join(left)} apart whatever bi_patch tells, so "
            "compiled code would not have the bits of eager code. Use --enforce-eager, or set BI_PATCH=0"
        )


def restore() -> None:
    """Undo `override` and `keep_whole`. Code that is compiled already keeps its calls."""
    while _undo:
        _undo.pop()()
    while _library:
        _library.pop()._destroy()


_undo: list[Callable[[], None]] = []
_BUNDLED = ("sigmoid", "silu", "gelu", "softplus")
_EQUAL = (
    *("exp", "expm1", "log", "log1p", "log2", "log10", "sqrt", "sin", "cos", "tan", "asin", "acos", "atan", "asinh"),
    *("tanh", "erf", "erfc", "erfinv"),
)
_LAYER_NORM = torch.ops.aten.native_layer_norm.default
_ROWS = (_LAYER_NORM, torch.ops.aten._softmax.default, torch.ops.aten._log_softmax.default)
_TAG = "bi_patch: whole operators, in every table: " + " ".join((*(row.name() for row in _ROWS), *_BUNDLED, *_EQUAL))


def _put_back(held: dict, entries: dict) -> None:
    """Put entries into `held` again. None: there was no such entry."""
    for name, value in entries.items():
        if value is None:
            held.pop(name, None)
        else:
            held[name] = value


def _set(config, name: str, value: object) -> None:
    """Set an option of a configuration of PyTorch until `restore`, in this thread and as the default of the others."""
    for held, what in ((config, name), (config._config[name], "default")):
        _undo.append(functools.partial(setattr, held, what, getattr(held, what)))
        setattr(held, what, value)


def _floats(x, *_, **__) -> bool:
    return x.dtype in _FLOATS


def _gelu(x, *, approximate="none"):
    return torch.ops.bi_cpu.gelu(x, approximate == "tanh")


def _softplus(x, beta=1, threshold=20):
    return torch.ops.bi_cpu.softplus(x, float(beta), float(threshold))


def _forms(name: str, compute, *forms: str) -> dict:
    return {form: (_floats, compute) for form in (name, *forms)}


_OVERRIDES: overrides.Overrides = {
    **_forms("sigmoid", lambda x: torch.ops.bi_cpu.sigmoid(x), "sigmoid.out", "sigmoid_"),
    **_forms("silu", lambda x: torch.ops.bi_cpu.silu(x), "silu.out", "silu_"),
    **_forms("gelu", _gelu, "gelu.out", "gelu_"),
    **_forms("softplus", _softplus, "softplus.out"),
    **_forms("rsqrt", lambda x: torch.ops.bi_cpu.rsqrt(x), "rsqrt.out", "rsqrt_"),
}
