"""The rows of each expert, in an order that the rows alone decide."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def chosen_rows(ids: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (an expert, its rows ascending, the place of the expert among each row's ids), experts ascending.

    ids: [rows, k]. Experts that nobody chose are left out.
    """
    flat = ids.reshape(-1).long()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts).tolist()
    first = 0
    for expert, count in enumerate(counts):
        at = order[first : first + count]
        first += count
        if count:
            yield expert, at // ids.shape[1], at % ids.shape[1]
