"""Random operands whose sums of products are exactly zero: what a kernel gives for them is what its order left."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def cancelling(rows: int, order: torch.Tensor, sign: int, generator: torch.Generator, dtype: torch.dtype):
    """Random [rows, K] whose columns come in pairs of equal (sign 1) or opposite (sign -1) values.

    order: a permutation of K columns, which says where pairs stand. A product of rows of both signs is exactly zero.
    Values are of the size of 8, so that what is left of a sum is no subnormal number in fp16.
    """
    import torch

    k = order.shape[0]
    half = torch.randn(rows, k // 2, generator=generator, device=order.device, dtype=torch.float32).mul_(8).to(dtype)
    odd = half.new_zeros((rows, k % 2))
    return torch.cat((half, half * sign, odd), 1)[:, order]
