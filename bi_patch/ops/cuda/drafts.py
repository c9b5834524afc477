"""The check of drafts on CUDA, in one launch (kernels/triton/drafts.py). PyTorch's operations would take twenty."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def check(
    drawn: torch.Tensor, inputs: torch.Tensor, edges: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of bi_patch.ops.drafts.check and, int32, their numbers. edges: integers [requests + 1], each request's
    first row, then the number of rows."""
    from bi_patch.kernels.triton import drafts

    return drafts.check(drawn, inputs, edges, most)
