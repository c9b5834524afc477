"""RMSNorm on CUDA by the bundled kernels."""

from __future__ import annotations

import torch

from bi_patch.kernels.triton import norm, norm_backward


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """x / sqrt(mean(x * x) + eps) * (weight + offset), rounded once. x: [rows, C]. weight: [C]. Returns x's shape."""
    return norm.rms_norm(x.contiguous(), weight.to(x.dtype), eps, None, offset)[0]


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x [rows, C] and of weight [C] (weight's dtype), from grad [rows, C]."""
    of_x, of_weight = norm_backward.rms_norm(x, grad, weight.to(x.dtype), eps, offset)
    return of_x, of_weight.to(weight.dtype)
