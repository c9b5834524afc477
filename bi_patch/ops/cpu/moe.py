"""The choice of experts on CPU by the bundled kernel: ties go to the lower expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def softmax_topk(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k experts of each row of logits [rows, experts] by softmax, ties by the lower id.

    Returns weights (fp32) and ids (int32), both [rows, top_k].
    """
    import torch

    return torch.ops.bi_cpu.softmax_topk(logits, top_k, renormalize)
