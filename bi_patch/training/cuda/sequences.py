"""Where the sequences of a batch lie, as attention's kernels want it. All layers of a model share one answer."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sequences:
    """rows: the rows of all sequences [tokens] int64, or None if they are all rows of the batch, in order.

    starts: each sequence's first row among these [sequences + 1] int32. lengths: [sequences] int32. longest: in rows.
    host: the lengths again, on the host. Sequences without rows are left out.
    """

    rows: torch.Tensor | None
    starts: torch.Tensor
    lengths: torch.Tensor
    longest: int
    host: tuple[int, ...]


# The last answer: the two tensors, weakly, their versions, the rows of the batch, and the answer. Asking the device
# costs a wait for all its work, in every layer.
_last: list = []


def of(starts: torch.Tensor, lengths: torch.Tensor, rows: int) -> Sequences:
    """The sequences of a batch of `rows` rows. starts, lengths: [sequences] int64."""
    asked = (_version(starts), _version(lengths), rows)
    if _last and _last[0]() is starts and _last[1]() is lengths and _last[2] == asked:
        return _last[3]
    found = _find(starts, lengths, rows)
    _last[:] = [weakref.ref(starts), weakref.ref(lengths), asked, found]
    return found


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _find(starts, lengths, rows: int) -> Sequences:
    spans = [(first, count) for first, count in zip(starts.tolist(), lengths.tolist(), strict=True) if count]
    counts = tuple(count for _, count in spans)
    begins = [0]
    for count in counts:
        begins.append(begins[-1] + count)
    device = starts.device
    whole = [first for first, _ in spans] == begins[:-1] and begins[-1] == rows
    at = None
    if not whole and spans:
        at = torch.cat([torch.arange(first, first + count, device=device) for first, count in spans])
    return Sequences(
        at,
        torch.tensor(begins, dtype=torch.int32, device=device),
        torch.tensor(counts, dtype=torch.int32, device=device),
        max(counts, default=0),
        counts,
    )
