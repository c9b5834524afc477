"""What a layer's sequences add to its fp32 chain on CPU, one sequence after the other.

A sequence's gradient is computed from fresh fp32 copies: a library may choose its code by the address of the first
element. So it depends on the sequence alone.
"""

from __future__ import annotations

import torch

Spans = tuple[tuple[int, int], ...]  # of each sequence: its first row, and the row after its last


def product(grad: torch.Tensor, x: torch.Tensor, spans: Spans, chain: torch.Tensor) -> None:
    """Add grad.T @ x of each sequence to chain [N, K] in place. grad: [rows, N]. x: [rows, K]. One dtype."""
    for first, last in spans:
        chain.addmm_(_copied(grad[first:last]).t(), _copied(x[first:last]))


def column_sum(grad: torch.Tensor, spans: Spans, chain: torch.Tensor) -> None:
    """Add the sum of each sequence's rows of grad [rows, N] to chain [N] in place."""
    for first, last in spans:
        chain.add_(_copied(grad[first:last]).sum(0))


def norm(grad: torch.Tensor, x: torch.Tensor, eps: float, spans: Spans, chain: torch.Tensor) -> None:
    """Add the gradient of RMSNorm's weight of each sequence to chain [C] in place. grad, x: [rows, C]."""
    for first, last in spans:
        own, held = _copied(grad[first:last]), _copied(x[first:last])
        chain.add_((own * (held * torch.rsqrt(held.pow(2).mean(-1, keepdim=True) + eps))).sum(0))


def embedding(grad: torch.Tensor, ids: torch.Tensor, spans: Spans, chain: torch.Tensor) -> None:
    """Add each row of grad [rows, C] in a sequence to the row of its id in chain [vocabulary, C] in place, ascending.

    ids: [rows] int64. index_put_ would add from several threads.
    """
    for first, last in spans:
        chain.index_add_(0, ids[first:last], _copied(grad[first:last]))


def _copied(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32, copy=True)
