"""RMSNorm on CPU by the bundled kernel, with its backward in fp32."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """x / sqrt(mean(x * x) + eps) * (weight + offset), rounded once. x: [rows, C]. weight: [C]. Returns x's shape."""
    return torch.ops.bi_cpu.rms_norm(x, weight.to(x.dtype), eps, offset)


def head_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of each head of x [rows, heads, D], with weight [D]. On CUDA, the kernel that rotates also norms."""
    return rms_norm(x.flatten(0, 1), weight, eps, 0.0).view(x.shape)


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x [rows, C] and of weight [C] (weight's dtype), from grad [rows, C]."""
    wide, g = x.float(), grad.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = wide * inverse
    of_normed = g * (weight.to(x.dtype).float() + offset)
    of_x = inverse * (of_normed - normed * (of_normed * normed).mean(-1, keepdim=True))
    return of_x.to(x.dtype), (g * normed).sum(0).to(weight.dtype)
