"""The choice of experts on CPU by the bundled kernel. The lower expert wins a tie."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def softmax_topk(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k experts of each row of logits [rows, experts] by softmax. The lower id wins a tie.

    Returns weights (fp32) and ids (int32), both [rows, top_k]. renormalize: divide each row's weights by their sum.
    """
    import torch

    return torch.ops.bi_cpu.softmax_topk(logits, top_k, renormalize)
