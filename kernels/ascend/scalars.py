"""Scalars that all kernels share."""

import triton
import triton.language as tl


@triton.jit
def wide(i):
    """i as int64. A loop's counter has no `.to` in the interpreter, where it is a plain int."""
    return tl.full([], 0, tl.int64) + i
