"""Sums over ranks: out[i] = round(sum over r of parts[r, i]), for parts [R, n] in bf16, fp16 or fp32.

Order: rank 0's value, then those of ranks 1, 2, ... are added in fp32; the result is rounded once. The order depends
on the number of ranks alone.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit(do_not_specialize=["n"])
def _rank_sum(parts, out, n, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    total = tl.load(parts + at, mask=mask, other=0.0).to(tl.float32)
    for rank in tl.static_range(1, RANKS):
        total += tl.load(parts + rank * n.to(tl.int64) + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def rank_sum(parts: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of contiguous parts [R, n] -> [n], of the same dtype."""
    ranks, n = parts.shape
    out = torch.empty(n, dtype=parts.dtype, device=parts.device)
    if n:
        _rank_sum[(triton.cdiv(n, _BLOCK),)](parts, out, n, RANKS=ranks, BLOCK=_BLOCK, num_warps=4)
    return out
