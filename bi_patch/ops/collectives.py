"""Sums over ranks: in rank order, in fp32, rounded once; and the check that a library's sum keeps one order.

Order of one element: rank 0's value, then the values of ranks 1, 2, ... are added in fp32; the result is rounded once.
It depends on the number of ranks alone. Two values have one sum only, whatever the order: a + b = b + a.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from bi_patch.ops import bits

# Bytes. The sizes at which libraries change the order lie far below; a larger message would take memory from a trainer.
LARGEST = 1 << 28


def in_rank_order(parts: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of parts [ranks, ...] (bf16, fp16 or fp32) -> [...], in this module's order."""
    total = parts[0].float()
    for rank in range(1, parts.shape[0]):
        total = total + parts[rank].float()
    return total.to(parts.dtype)


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
    ordered: bool = False,
) -> int | None:
    """The smallest number of rows whose sum over ranks has other bits than the sum of one row, or None.

    Every rank calls it at the same time. Each rank has one row, which differs from those of the other ranks, and sends
    it 1, 2, 3, ... times in one message. So each row of a result must have the bits of the first result. ordered: each
    row must also have the bits of the sum in rank order.

    all_reduce: a tensor -> its sum over the ranks; it may write the sum into the tensor. rank: this process's place in
    the group of `ranks`. width: elements in a row. most: the largest number of rows; messages stay below 256 MiB.
    """
    every = _rows(ranks, width).to(dtype)
    row = every[rank : rank + 1].to(device)
    first = None
    alone = in_rank_order(every[:, None]).to(device) if ordered else all_reduce(row.clone())
    for rows in lengths(max(1, min(most, LARGEST // (width * row.element_size())))):
        # A rank that stopped here would let the others wait.
        total = all_reduce(row.repeat(rows, 1))
        if bits.differing(total, alone.expand(rows, width)) and first is None:
            first = rows
    return first


def unlike(
    one: Callable[[torch.Tensor], torch.Tensor],
    other: Callable[[torch.Tensor], torch.Tensor],
    *,
    rank: int,
    lengths: Iterable[int],
    dtype: torch.dtype,
    device: torch.device | str,
) -> int | None:
    """The first number of elements whose sum over two ranks has other bits in one way than in the other, or None.

    Both ranks call it at the same time. Parts are random bits, so that all exponents, subnormals, infinities and NaNs
    occur. Both ends of a message hold each pair of some special numbers.

    one, other: x [n] -> its sum over the ranks [n]. rank: 0 or 1. lengths: the numbers of elements to try. dtype: bf16,
    fp16 or fp32.
    """
    ends, first = _special(dtype)[rank].to(device), None
    for length in lengths:
        x = _random_bits(length, rank, dtype, device)
        x[: len(ends)] = ends[:length]
        x[-len(ends) :] = ends[-length:]
        # A rank that stopped here would let the other one wait.
        if bits.differing(one(x), other(x)) and first is None:
            first = length
    return first


def _special(dtype: torch.dtype) -> torch.Tensor:
    """[2, pairs]: each pair of zeros, subnormals, numbers beside 1 and the largest, infinities, NaN, of both signs."""
    limits = torch.finfo(dtype)
    eps, least, largest = limits.eps, limits.smallest_normal, limits.max
    found = [0.0, least * eps, least * (1 - eps), least, least * (1 + eps), eps / 2, 0.75 * eps, 1.0, 1.0 + eps]
    found += [largest * eps / 4, largest / 2, largest, float("inf"), float("nan")]
    both = torch.tensor([*found, *(-x for x in found)], dtype=torch.float64).to(dtype)
    return torch.stack([both.repeat_interleave(len(both)), both.repeat(len(both))])


def _random_bits(length: int, rank: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    integer, end = {2: (torch.int16, 1 << 15), 4: (torch.int32, 1 << 31)}[dtype.itemsize]
    generator = torch.Generator(device).manual_seed(rank)
    return torch.empty(length, dtype=integer, device=device).random_(-end, end, generator=generator).view(dtype)


def moved_slices(
    reduce_scatter: Callable[[torch.Tensor, list[int]], torch.Tensor],
    *,
    rank: int,
    ranks: int,
    width: int,
    most: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> list[int] | None:
    """The first sizes of slices of which a row has other bits than the sum in rank order, or None.

    As `moved`, for ranks that keep a slice of the sum each: equal slices, and slices of another size for each rank.
    reduce_scatter: (rows [sum(sizes), width], sizes) -> this rank's slice [sizes[rank], width]. most: the largest
    number of rows of a slice; messages stay below 256 MiB. Every rank must find the same, or one would not serve a row
    that another one serves: compare the results.
    """
    every = _rows(ranks, width).to(dtype)
    row, want = every[rank : rank + 1].to(device), in_rank_order(every[:, None]).to(device)
    first = None
    for rows in lengths(max(1, min(most, LARGEST // (ranks * width * row.element_size())))):
        for sizes in ([rows] * ranks, [max(1, rows * (r + 1) // ranks) for r in range(ranks)]):
            got = reduce_scatter(row.repeat(sum(sizes), 1), sizes)
            if bits.differing(got, want.expand(sizes[rank], width)) and first is None:
                first = sizes
    return first


def _rows(ranks: int, width: int) -> torch.Tensor:
    """fp32 [ranks, width]: the row of each rank. In each column, two ranks hold 2**15 and -2**15, others small numbers.

    A small number that is added between the two large ones loses its bits, in fp32 accumulators as well. Which ranks
    hold the large ones changes from column to column, so that any two orders of three or more ranks differ in some.
    """
    shared = torch.Generator().manual_seed(ranks)
    small = torch.randn(ranks, width, generator=shared) * 2.0**-10
    place = torch.rand(ranks, width, generator=shared).argsort(0)
    large = (place == 0).float() - (place == 1).float()
    return small * (place > 1) + large * 2.0**15 if ranks > 2 else small
