"""Gradients of sequences, added to an fp32 chain one sequence after the other, by PyTorch alone.

A sequence's gradient is computed from fresh fp32 copies: a library may choose its code by the address of the first
element. So it depends on the sequence alone.
"""

from __future__ import annotations

import torch

Spans = tuple[tuple[int, int], ...]  # of each sequence: its first row, and the row after its last


def copied(x: torch.Tensor) -> torch.Tensor:
    """x in fp32, at an address of its own."""
    return x.to(torch.float32, copy=True)


def column_sum(grad: torch.Tensor, spans: Spans, chain: torch.Tensor) -> None:
    """Add the sum of each sequence's rows of grad [rows, N] to chain [N] in place."""
    for first, last in spans:
        chain.add_(copied(grad[first:last]).sum(0))


def norm(grad: torch.Tensor, x: torch.Tensor, eps: float, spans: Spans, chain: torch.Tensor) -> None:
    """Add the gradient of RMSNorm's weight of each sequence to chain [C] in place. grad, x: [rows, C]."""
    for first, last in spans:
        own, held = copied(grad[first:last]), copied(x[first:last])
        chain.add_((own * (held * torch.rsqrt(held.pow(2).mean(-1, keepdim=True) + eps))).sum(0))
