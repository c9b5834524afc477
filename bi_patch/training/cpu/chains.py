"""What a layer's sequences add to its fp32 chain on CPU, one sequence after the other."""

from __future__ import annotations

import torch

from bi_patch.training.apart import Spans, column_sum, copied, norm

__all__ = ["column_sum", "embedding", "norm", "product"]


def product(grad: torch.Tensor, x: torch.Tensor, spans: Spans, chain: torch.Tensor) -> None:
    """Add grad.T @ x of each sequence to chain [N, K] in place. grad: [rows, N]. x: [rows, K]. One dtype."""
    for first, last in spans:
        chain.addmm_(copied(grad[first:last]).t(), copied(x[first:last]))


def embedding(grad: torch.Tensor, ids: torch.Tensor, spans: Spans, chain: torch.Tensor) -> None:
    """Add each row of grad [rows, C] in a sequence to the row of its id in chain [vocabulary, C] in place, ascending.

    ids: [rows] int64. index_put_ would add from several threads.
    """
    for first, last in spans:
        chain.index_add_(0, ids[first:last], copied(grad[first:last]))
