"""The ways in which a trainer lays sequences out: alone, padded, packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ALONE, RIGHT, LEFT, PACKED = "alone", "padded right", "padded left", "packed"
LAYOUTS = (ALONE, RIGHT, LEFT, PACKED)


@dataclass(frozen=True)
class Batch:
    """ids: [batch, length]. mask: [batch, length] or None. positions: [batch, length] or None. places: for each
    sequence its row and the index of its first token."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor | None
    places: list[tuple[int, int]]

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on another device."""
        moved = (None if x is None else x.to(device) for x in (self.ids, self.mask, self.positions))
        return Batch(*moved, self.places)


def batches(sequences: Sequence[Sequence[int]], layout: str) -> list[Batch]:
    """The sequences, in order, in one batch; alone: in a batch each."""
    if layout == ALONE:
        return [Batch(torch.tensor([list(s)]), None, None, [(0, 0)]) for s in sequences]
    if layout == PACKED:
        lengths = [len(s) for s in sequences]
        begins = [sum(lengths[:i]) for i in range(len(lengths))]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        flat = torch.tensor([[token for s in sequences for token in s]])
        return [Batch(flat, None, positions, [(0, at) for at in begins])]
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    places = []
    for row, s in enumerate(sequences):
        at = longest - len(s) if layout == LEFT else 0
        ids[row, at : at + len(s)] = torch.tensor(list(s))
        mask[row, at : at + len(s)] = 1
        places.append((row, at))
    positions = (mask.cumsum(-1) - 1).clamp(min=0) if layout == LEFT else None
    return [Batch(ids, mask, positions, places)]
