"""RMSNorm on CPU by the bundled kernel, compiled or not (kernels/cpu/README.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, residual: torch.Tensor | None = None, offset: float = 0.0
):
    """RMSNorm of x [..., C] times (weight + offset); with a residual, (norm of x + residual, x + residual)."""
    import torch

    if residual is None:
        return torch.ops.bi_cpu.rms_norm(x, weight, eps, offset)
    return torch.ops.bi_cpu.add_rms_norm(x, residual, weight, eps, offset)
