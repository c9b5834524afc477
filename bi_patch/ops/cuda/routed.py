"""The factor of a layer's routed experts on CUDA: an operator, so that compiled code rounds where eager code does.

Inductor would multiply and add the shared experts' output without rounding in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bi_patch.ops.registration import define

if TYPE_CHECKING:
    import torch


def define_op() -> None:
    """Define torch.ops.bi_patch.routed_scale. A second call does nothing."""
    define(
        "routed_scale(Tensor x, float factor) -> Tensor",
        lambda x, factor: (x * factor).contiguous(),
        "CUDA",
        lambda x, factor: x.new_empty(x.shape),
    )


def scale(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x * factor, rounded to x's dtype -> x's shape and dtype."""
    import torch

    return torch.ops.bi_patch.routed_scale(x, factor)
