"""Rotary embedding on CUDA by the bundled kernel. Its backward is the inverse rotation, by the same kernel."""

from __future__ import annotations

import torch

from bi_patch.kernels.triton import rope as kernel


def rope(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of each head. x: [rows, heads, D]. table: [rows, D] in x's dtype, cosines, then sines."""
    rows, heads, size = x.shape
    flat = x.reshape(rows, heads * size)
    positions = torch.arange(rows, device=x.device)
    return kernel.rotate(positions, flat, flat[:, :0], table.contiguous(), size)[0].view(rows, heads, size)


def rope_backward(grad: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The gradient of x [rows, heads, D], from grad [rows, heads, D]."""
    cos, sin = table.chunk(2, -1)
    return rope(grad, torch.cat((cos, -sin), -1))
