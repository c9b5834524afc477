"""Poolers on CUDA by bundled Triton kernels: each pooled row is computed from its own sequence alone, in one order."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def normalize(x: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """x [..., C] (bf16, fp16 or fp32) divided by the L2 norm of its row, or by eps if the norm is smaller."""
    from bi_patch.kernels.triton import pooling

    return pooling.l2_normalize(x, eps)


def mean(x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """The mean of each sequence's rows -> fp32 [sequences, C]. The order of the sum depends on the sequence alone.

    x: [tokens, C], the rows of all sequences, one after the other. starts: int [sequences + 1] on x's device: where
    each sequence begins, and where the last ends.
    """
    from bi_patch.kernels.triton import pooling

    return pooling.mean_rows(x, starts)
