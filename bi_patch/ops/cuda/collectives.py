"""The order of a sum over ranks: the same for every size of the message, and at every place in it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bi_patch.ops import bits

# Bytes. The sizes at which libraries change the order lie far below; a larger message would take memory from a trainer.
_LARGEST = 1 << 28


def lengths(most: int) -> list[int]:
    """Numbers of rows to try, ascending: powers of two and the number after each, up to `most`, and `most` itself."""
    powers = [1 << k for k in range(most.bit_length())]
    return sorted({n for n in (*powers, *(p + 1 for p in powers), most) if n <= most})


def moved(
    all_reduce: Callable[[torch.Tensor], torch.Tensor],
    *,
    rank: int,
    ranks: int,
    width: int,
    most: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> int | None:
    """The smallest number of rows whose sum over ranks has other bits than the sum of one row, or None.

    Every rank calls it at the same time. Each rank has one row, which differs from those of the other ranks, and sends
    it 1, 2, 3, ... times in one message. So each row of a result must have the bits of the first result.

    all_reduce: a tensor -> its sum over the ranks, as a new tensor. rank: this process's place in the group of
    `ranks`. width: elements in a row. most: the largest number of rows; messages stay below 256 MiB.
    """
    row = _row(rank, ranks, width).to(dtype).to(device)
    alone = all_reduce(row)
    first = None
    for rows in lengths(max(1, min(most, _LARGEST // (width * row.element_size())))):
        # A rank that stopped here would let the others wait.
        total = all_reduce(row.expand(rows, width).contiguous())
        if bits.differing(total, alone.expand(rows, width)) and first is None:
            first = rows
    return first


def _row(rank: int, ranks: int, width: int) -> torch.Tensor:
    """fp32 [1, width]: the row of a rank. In each column, two ranks hold 2**15 and -2**15, and others small numbers.

    A small number that is added between the two large ones loses its bits, in fp32 accumulators as well. Which ranks
    hold the large ones changes from column to column, so that any two orders of three or more ranks differ in some.
    """
    shared = torch.Generator().manual_seed(ranks)
    small = torch.randn(ranks, width, generator=shared) * 2.0**-10
    place = torch.rand(ranks, width, generator=shared).argsort(0)
    large = (place == 0).float() - (place == 1).float()
    return (small * (place > 1) + large * 2.0**15)[rank : rank + 1] if ranks > 2 else small[rank : rank + 1]
