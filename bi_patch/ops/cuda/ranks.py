"""Sums over ranks on CUDA, in rank order (ops/collectives.py), whatever carries the parts.

vLLM's one-stage all-reduce: each rank reads all parts over peer memory and adds them from rank 0 on, in fp32, rounded
once. It takes messages of whole 16-byte lines, so others are filled up with zeros.

Of two ranks, NCCL may add messages that exceed vLLM's buffer of peer memory (Adder): two parts have one sum only, since
a + b = b + a. Without a certificate, the one-stage all-reduce adds such messages in pieces.

Where it is off, NCCL carries the parts and the bundled kernel adds them. One-shot, for small messages: every rank gets
all parts. Two-shot, for large ones: each rank gets its slice of all parts, adds them, and the slices are gathered. NCCL
itself adds nothing there, so it may run at full speed. The bits are the same in every case.

Ranks that share experts' rows keep a slice of the sum each (reduce_scatter). A slice has the bits of the whole sum, so
which rank owns a row changes none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_LINE = 16  # bytes
LARGE = 1 << 20  # bytes: messages above it are two-shot where NCCL carries them


@dataclass(frozen=True)
class Carrier:
    """What moves parts between ranks, and adds nothing.

    gather: (out [ranks, n], x [n]) -> None, every rank's x. exchange: (out [ranks, n], x) -> None, this rank's slice of
    every rank's x. x: a contiguous slice for each rank, [ranks, n] or tensors of n elements, where n is a number of the
    rank's own.
    """

    ranks: int
    gather: Callable[[torch.Tensor, torch.Tensor], object]
    exchange: Callable[[torch.Tensor, torch.Tensor | Sequence[torch.Tensor]], object]


@dataclass(frozen=True)
class Adder:
    """NCCL as it adds the parts of two ranks, as far as a certificate goes.

    add: x -> its sum over two ranks, as a new tensor. most: for each certified dtype, the bytes of the largest message.
    """

    add: Callable[[torch.Tensor], torch.Tensor]
    most: Mapping[torch.dtype, int]

    def serves(self, x: torch.Tensor, own: Any) -> bool:
        """Whether x exceeds the buffer of `own`, vLLM's CustomAllreduce, and has a certificate.

        No certificate runs in a CUDA graph, where NCCL may choose another way.
        """
        within = own.max_size < x.nbytes <= self.most.get(x.dtype, 0)
        return within and x.is_contiguous() and not torch.cuda.is_current_stream_capturing()


def all_reduce(x: torch.Tensor, own: Any | None, carrier: Carrier, adder: Adder | None = None) -> torch.Tensor:
    """The sum of x (bf16, fp16 or fp32, of any shape) over ranks, as a new tensor. own: vLLM's CustomAllreduce."""
    if own is not None and not own.disabled:
        if adder is not None and adder.serves(x, own):
            return adder.add(x)
        if (total := own.custom_all_reduce(x) if own.should_custom_ar(x) else _filled_up(x, own)) is not None:
            return total
    from bi_patch.kernels.triton.ranks import rank_sum

    flat = x.contiguous().view(-1)
    if x.numel() * x.element_size() > LARGE and x.numel() % carrier.ranks == 0:
        rows = flat.view(carrier.ranks, -1)
        parts, total = torch.empty_like(rows), torch.empty_like(rows)
        carrier.exchange(parts, rows)
        carrier.gather(total, rank_sum(parts))
        return total.view(x.shape)
    parts = torch.empty((carrier.ranks, flat.numel()), dtype=x.dtype, device=x.device)
    carrier.gather(parts, flat)
    return rank_sum(parts).view(x.shape)


def reduce_scatter(x: torch.Tensor, sizes: Sequence[int], rank: int, carrier: Carrier) -> torch.Tensor:
    """This rank's rows of the sum of x over ranks, in rank order, as a new tensor [sizes[rank], ...].

    x: [sum(sizes), ...] in bf16, fp16 or fp32; sizes: the number of rows of each rank. Raises ValueError if they do not
    fit.
    """
    from bi_patch.kernels.triton.ranks import rank_sum

    if len(sizes) != carrier.ranks or sum(sizes) != x.shape[0]:
        raise ValueError(f"{x.shape[0]} rows do not fall into the slices {list(sizes)} of {carrier.ranks} ranks")
    slices = [part.reshape(-1) for part in x.contiguous().split(list(sizes))]
    parts = torch.empty((carrier.ranks, slices[rank].numel()), dtype=x.dtype, device=x.device)
    carrier.exchange(parts, slices)
    return rank_sum(parts).view(sizes[rank], *x.shape[1:])


def _filled_up(x: torch.Tensor, own: Any) -> torch.Tensor | None:
    """The sum of a message that does not fill whole lines, or None if vLLM's all-reduce does not take it at all."""
    n = x.numel()
    filled = torch.zeros(-(-n * x.element_size() // _LINE) * _LINE // x.element_size(), dtype=x.dtype, device=x.device)
    if not n or not own.should_custom_ar(filled):
        return None
    filled[:n].copy_(x.reshape(-1))
    return own.custom_all_reduce(filled)[:n].view(x.shape)
