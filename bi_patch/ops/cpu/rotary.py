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


def sections(positions: torch.Tensor, cache: torch.Tensor, sizes: tuple[int, ...], interleaved: bool) -> torch.Tensor:
    """The rows of cosines and sines of tokens that have a position of time, of height and of width.

    positions: [3, tokens]. cache: [positions, rotary], cosines, then sines. sizes: how many of the rotary // 2 angles
    each position turns; interleaved: they take turns, and time has the rest. -> [tokens, rotary].
    """
    import torch

    half = cache.shape[1] // 2
    owner = [i for i, size in enumerate(sizes) for _ in range(size)]
    if interleaved:  # angle 3 j + i belongs to position i, as far as its section goes
        owner = [c % 3 if c < 3 * sizes[c % 3] else 0 for c in range(half)]
    held = cache[positions]  # [3, tokens, rotary]
    kept = [torch.tensor([o == i for o in owner] * 2) for i in range(3)]
    return torch.where(kept[1], held[1], torch.where(kept[2], held[2], held[0]))
