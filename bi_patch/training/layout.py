"""Where each sequence of a batch lies in its flat rows [batch x length]."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bi_patch.errors import UnsupportedFeature


@dataclass(frozen=True)
class Spans:
    """The sequences of a batch as half-open ranges of flat rows, in the order of the batch.

    total: rows of the batch, padding included.
    """

    ranges: tuple[tuple[int, int], ...]
    total: int

    def of(self, rows: int, module: torch.nn.Module) -> tuple[tuple[int, int], ...]:
        """The ranges, for a module that got this many rows. Raises UnsupportedFeature for another number of rows."""
        if rows != self.total:
            raise UnsupportedFeature(
                f"{type(module).__name__} got {rows} rows of a batch of {self.total}: the gradient of each sequence "
                "needs all rows of the batch"
            )
        return self.ranges


def spans(shape: torch.Size, mask: torch.Tensor | None, positions: torch.Tensor | None) -> Spans:
    """The spans of a batch of `shape` [batch, length].

    mask: [batch, length], 0 for padding, or None. positions: [batch or 1, length] position ids, or None; without
    padding, a position 0 begins a sequence (packed sequences). Raises UnsupportedFeature for a mask that is no padding.
    """
    batch, length = shape
    total = batch * length
    if mask is not None and not bool(mask.all()):
        return Spans(tuple(_padded(mask, length)), total)
    if positions is not None and positions.shape[0] == batch:
        flat = positions.reshape(-1)
        begins = sorted({*range(0, total, length), *(flat == 0).nonzero()[:, 0].tolist()})
        return Spans(tuple(zip(begins, [*begins[1:], total])), total)
    return Spans(tuple((at, at + length) for at in range(0, total, length)), total)


def _padded(mask: torch.Tensor, length: int):
    if mask.dim() != 2:
        raise UnsupportedFeature(f"an attention mask of {mask.dim()} dimensions: give a padding mask [batch, length]")
    for at, row in enumerate(mask.bool().tolist()):
        count = sum(row)
        if not count:
            continue
        first = row.index(True)
        if not all(row[first : first + count]):
            raise UnsupportedFeature(f"the attention mask of sequence {at} has holes: it is no padding mask")
        yield at * length + first, at * length + first + count
