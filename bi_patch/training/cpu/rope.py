"""Rotary embedding on CPU by the bundled kernel. Its backward is the inverse rotation."""

from __future__ import annotations

import torch


def rope(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of each head. x: [rows, heads, D]. table: [rows, D] in x's dtype, cosines, then sines."""
    rows, heads, size = x.shape
    turned = torch.ops.bi_cpu.rope(torch.arange(rows), x.reshape(rows, heads * size), table.contiguous(), size, True)
    return turned.view(rows, heads, size)


def rope_backward(grad: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The gradient of x [rows, heads, D], from grad [rows, heads, D]."""
    cos, sin = table.float()[:, None].chunk(2, -1)
    a, b = grad.float().chunk(2, -1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -1).to(grad.dtype)
