"""Scalar helpers of the Ascend kernels."""

import triton
import triton.language as tl


@triton.jit
def wide(i):
    """i as int64. In Triton's interpreter a loop counter is a plain int, which has no `.to`."""
    return tl.full([], 0, tl.int64) + i
