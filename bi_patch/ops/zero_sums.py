"""Random operands whose sums of products are exactly zero. A kernel's output for them is the rounding that its order of
summation leaves, so another order shows in the output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def cancelling(rows: int, order: torch.Tensor, sign: int, generator: torch.Generator, dtype: torch.dtype):
    """Random [rows, K] of `dtype` whose columns come in pairs of equal (sign 1) or opposite (sign -1) values.

    order: a permutation of the K columns, int64, that places the pairs. The dot product of a row made with sign 1 and a
    row made with sign -1 is exactly zero. The values have a standard deviation of 8, so that the rounding left of a sum
    is not a subnormal number in fp16.
    """
    import torch

    k = order.shape[0]
    half = torch.randn(rows, k // 2, generator=generator, device=order.device, dtype=torch.float32).mul_(8).to(dtype)
    odd = half.new_zeros((rows, k % 2))
    return torch.cat((half, half * sign, odd), 1)[:, order]
