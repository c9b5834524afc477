"""RMSNorm on CUDA as ops that torch.compile does not open: one order for all row counts (kernels/triton/norm.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bi_patch.ops.registration import define

if TYPE_CHECKING:
    import torch


def define_ops() -> None:
    """Define torch.ops.bi_patch.rms_norm and .add_rms_norm. Idempotent."""
    arguments = "Tensor? weight, float eps, float offset"
    define(f"rms_norm(Tensor x, {arguments}) -> Tensor", _rms_norm, "CUDA", lambda x, *_: x.new_empty(x.shape))
    define(
        f"add_rms_norm(Tensor x, Tensor residual, {arguments}) -> (Tensor, Tensor)",
        _add_rms_norm,
        "CUDA",
        lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
    )


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
