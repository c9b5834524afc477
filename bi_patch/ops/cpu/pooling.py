"""Poolers on CPU by bundled kernels: each pooled row is computed from its own sequence alone, in one order."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def normalize(x: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """x [..., C] (bf16, fp16 or fp32) divided by the L2 norm of its row, or by eps if the norm is smaller."""
    import torch

    return torch.ops.bi_cpu.l2_normalize(x, eps)


def softmax(x: torch.Tensor) -> torch.Tensor:
    """The softmax of x [..., C] (bf16, fp16 or fp32) over its last dimension."""
    import torch

    return torch.ops.bi_cpu.softmax(x)


def mean(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The mean of each sequence's rows -> fp32 [sequences, C]. The rows are added in ascending order.

    x: [tokens, C], the rows of all sequences, one after the other. lengths: int, [sequences], on the CPU.
    """
    import torch

    starts = torch.zeros(lengths.numel() + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=starts[1:])  # of integers: the numbers are exact
    return torch.ops.bi_cpu.mean_rows(x, starts)
