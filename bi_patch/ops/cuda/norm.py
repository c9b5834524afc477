"""RMSNorm on CUDA as ops that torch.compile does not open: one order for all row counts (kernels/triton/norm.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_defined: list[torch.library.Library] = []


def define_ops() -> None:
    """Define torch.ops.bi_patch.rms_norm and .add_rms_norm. Idempotent."""
    import torch

    if _defined:
        return
    library = torch.library.Library("bi_patch", "FRAGMENT")
    library.define("rms_norm(Tensor x, Tensor? weight, float eps, float offset) -> Tensor")
    library.define(
        "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset) -> (Tensor, Tensor)"
    )
    library.impl("rms_norm", _rms_norm, "CUDA")
    library.impl("add_rms_norm", _add_rms_norm, "CUDA")
    library.impl("rms_norm", lambda x, weight, eps, offset: x.new_empty(x.shape), "Meta")
    library.impl(
        "add_rms_norm",
        lambda x, residual, weight, eps, offset: (x.new_empty(x.shape), x.new_empty(x.shape)),
        "Meta",
    )
    _defined.append(library)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, residual: torch.Tensor | None = None, offset: float = 0.0
):
    """RMSNorm of x [..., C] times (weight + offset); with a residual, (norm of x + residual, x + residual)."""
    import torch

    if residual is None:
        return torch.ops.bi_patch.rms_norm(x, weight, eps, offset)
    return torch.ops.bi_patch.add_rms_norm(x, residual, weight, eps, offset)


def _rms_norm(x, weight, eps, offset):
    from bi_patch.kernels.triton import norm

    return norm.rms_norm(x, weight, eps, None, offset)[0]


def _add_rms_norm(x, residual, weight, eps, offset):
    from bi_patch.kernels.triton import norm

    return norm.rms_norm(x, weight, eps, residual, offset)
