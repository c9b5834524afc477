"""What all operators on Ascend share: the error for an unsupported call, and the overloads that write into tensors.

The table in bi_patch.ops.ascend.dispatch maps operators to functions of this package. Each function has the signature
of its operator and takes tensors on the NPU. A function raises UnsupportedFeature for an argument that it does not
cover, and names the argument. No function passes a call on to a native kernel. "Floats" in a docstring means bf16, fp16
or fp32. Results have the dtype of the first tensor unless a docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

from bi_patch.errors import UnsupportedFeature


def refuse(op: str, why: str):
    """Raise UnsupportedFeature. op: the operator's full name. why: what the call asks for that is not covered."""
    raise UnsupportedFeature(f"{op}: {why}. bi_patch fixes no order for this call on Ascend. Set BI_PATCH=0")


def out_form(function: Callable, results: int = 1) -> Callable:
    """The `.out` overload of `function`: copies the results into `out`, which is a tensor or `results` tensors."""

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
    """The overload of `function` that copies the results into tensors given as keyword arguments of these names."""

    def into(*args, **kwargs):
        targets = [kwargs.pop(name) for name in names]
        made = function(*args, **kwargs)
        for target, value in zip(targets, made, strict=True):
            if value.numel():
                target.copy_(value.view(target.shape))
        return tuple(targets)

    return into


def in_place(function: Callable) -> Callable:
    """The in-place overload of `function`: copies the result into the first argument."""

    def into(self, *args, **kwargs):
        return self.copy_(function(self, *args, **kwargs))

    return into


def along(x, dim: int, run: Callable):
    """Call `run`, which works along the last dimension, on x [...] along `dim`; returns run's result in x's layout."""
    if x.dim() == 0:
        return run(x[None])[0]
    if dim % x.dim() == x.dim() - 1:
        return run(x)
    return run(x.transpose(dim, -1).contiguous()).transpose(dim, -1).contiguous()
