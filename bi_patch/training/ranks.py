"""A row-parallel linear layer as the ranks of a tensor-parallel sampler compute it, on one device."""

from __future__ import annotations

from collections.abc import Callable

import torch


def by_rank(
    product: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    parts: int,
) -> torch.Tensor:
    """x [rows, K] @ weight [N, K].T + bias [N] -> [rows, N], by `product` (x, weight, bias), in x's dtype.

    weight and bias are rounded to x's dtype. parts: 1, or how many ranks share K. Each part of K is then rounded as its
    rank does, and the parts are added in the order of ranks in fp32 and rounded once. The bias belongs to rank 0.
    """
    held, own = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if parts == 1:
        return product(x, held, own)
    width = x.shape[1] // parts
    total = None
    for rank in range(parts):
        cut = slice(rank * width, (rank + 1) * width)
        part = product(x[:, cut].contiguous(), held[:, cut].contiguous(), own if rank == 0 else None).float()
        total = part if total is None else total + part
    return total.to(x.dtype)
