"""Rotary embedding on CPU by the bundled kernel: fp32 inside, rounded once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rope(positions: torch.Tensor, x: torch.Tensor, cache: torch.Tensor, head_size: int, neox: bool) -> torch.Tensor:
    """x [tokens, heads * head_size], rotated by positions [tokens] -> the same shape.

    cache: [positions, rotary], cosines, then sines. neox: rotate halves of a head; else neighbouring elements.
    """
    import torch

    return torch.ops.bi_cpu.rope(positions, x, cache, head_size, neox)
