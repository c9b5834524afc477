"""MKL's vector functions, which PyTorch's pointwise operators on CPU call, choose their kernels before threads do.

MKL chooses the kernel of a function when the function is first called. If two threads make this call at once, one can
get the kernel of low precision: a relative error of 1e-4, in its part of one tensor, seldom, and mostly on a busy
machine. Rotary tables are such tensors, so every token of an engine can have other bits after a restart. Once a call
has returned, all further calls use the right kernel. See https://github.com/pytorch/pytorch/issues/188792.
"""

from __future__ import annotations

_settled = False

# Every pointwise function with a kernel in MKL. The others are served by PyTorch's own code.
FUNCTIONS = (
    *("abs", "acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1", "log", "log10", "log1p"),
    *("log2", "sin", "sinh", "sqrt", "tan", "tanh", "trunc"),
)


def settle() -> None:
    """Call each function once, on one element and so from one thread. Takes a few milliseconds, once a process."""
    global _settled
    if _settled:
        return
    import torch

    for dtype in (torch.float32, torch.float64):
        half = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for name in FUNCTIONS:
            getattr(torch, name)(half)
    _settled = True
