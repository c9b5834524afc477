"""Softmax routing to experts on CPU by the bundled kernel: ties go to the lower expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def softmax_topk(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax routing of logits [rows, experts]: weights (fp32) and ids (int32) [rows, top_k], ties by the lower id."""
    import torch

    return torch.ops.bi_cpu.route(logits, top_k, renormalize)
