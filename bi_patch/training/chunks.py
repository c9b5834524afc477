"""Rows in chunks, so that large results exist for few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def chunked(most: int, rows: torch.Tensor, *others: torch.Tensor | None) -> Iterator[tuple]:
    """Yield (a slice, rows[slice], each of others[slice]) for up to `most` rows at a time, ascending.

    rows, others: [rows, ...]. None stays None.
    """
    for first in range(0, len(rows), most):
        at = slice(first, first + most)
        yield at, rows[at], *(None if x is None else x[at] for x in others)
