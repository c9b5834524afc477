"""What every operator on Ascend shares: how it refuses, and the overloads that write into given tensors.

Each function has the signature of the operator that it serves (bi_patch.ops.ascend.dispatch says which) and takes
tensors on the NPU. An argument that the order does not cover is UnsupportedFeature, named; none is passed on to a
native kernel. Floats are bf16, fp16 or fp32; results have the dtype of the first tensor unless a docstring says
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

from bi_patch.errors import UnsupportedFeature


def refuse(op: str, why: str):
    """Raise UnsupportedFeature, naming the operator and what the order does not cover."""
    raise UnsupportedFeature(f"{op}: {why}. No order is fixed for it on Ascend; set BI_PATCH=0 to run without bi_patch")


def out_form(function: Callable, results: int = 1) -> Callable:
    """The `.out` overload of a function: the same values, copied into `out` (a tensor, or `results` tensors)."""

    def into(*args, out, **kwargs):
        made = function(*args, **kwargs)
        if results == 1:
            return out.copy_(made)
        for target, value in zip(out, made, strict=True):
            if value.numel():
                target.copy_(value.view(target.shape))
        return tuple(out)

    return into


def named_out_form(function: Callable, names: tuple[str, ...]) -> Callable:
    """The same for an overload whose results are keyword arguments of these names."""

    def into(*args, **kwargs):
        targets = [kwargs.pop(name) for name in names]
        made = function(*args, **kwargs)
        for target, value in zip(targets, made, strict=True):
            if value.numel():
                target.copy_(value.view(target.shape))
        return tuple(targets)

    return into


def in_place(function: Callable) -> Callable:
    """The overload that writes into its first argument."""

    def into(self, *args, **kwargs):
        return self.copy_(function(self, *args, **kwargs))

    return into


def along(x, dim: int, run: Callable):
    """run over the last dimension, of x with `dim` moved there."""
    if x.dim() == 0:
        return run(x[None])[0]
    if dim % x.dim() == x.dim() - 1:
        return run(x)
    return run(x.transpose(dim, -1).contiguous()).transpose(dim, -1).contiguous()
