"""RMSNorm on CUDA by the bundled kernels."""

from __future__ import annotations

import torch

from bi_patch.kernels.triton import norm, norm_backward, rope


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """x / sqrt(mean(x * x) + eps) * (weight + offset), rounded once. x: [rows, C]. weight: [C]. Returns x's shape."""
    return norm.rms_norm(x.contiguous(), weight.to(x.dtype), eps, None, offset)[0]


def head_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of each head of x [rows, heads, D], with weight [D], by the kernel that norms and rotates in the sampler.

    That kernel rounds a normed head before it rotates. Here it rotates by nothing, and the rotation follows.
    """
    rows, heads, size = x.shape
    flat, held = x.reshape(rows, heads * size), weight.to(x.dtype)
    nothing = torch.cat((held.new_ones(1, size // 2), held.new_zeros(1, size // 2)), 1)
    positions = torch.zeros(rows, dtype=torch.int64, device=x.device)
    return rope.rotate(positions, flat, flat[:, :0], nothing, size, held, held, eps)[0].view(x.shape)


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x [rows, C] and of weight [C] (weight's dtype), from grad [rows, C]."""
    of_x, of_weight = norm_backward.rms_norm(x, grad, weight.to(x.dtype), eps, offset)
    return of_x, of_weight.to(weight.dtype)
