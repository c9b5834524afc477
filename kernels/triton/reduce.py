"""Sums and means over a row, in one order for every number of rows.

out[r] = round(sum over c of x[r, c], in fp32, * scale). Order: one program a row; BLOCK columns at a time are added to
BLOCK running sums in ascending order, which are then summed. BLOCK depends on the number of columns alone.
"""

import torch
import triton
import triton.language as tl

_WIDEST = 2048


@triton.jit
def _row_sum(x, out, cols, divisor, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, cols, BLOCK):
        sums += tl.load(x + row * cols + start + c, mask=start + c < cols, other=0.0).to(tl.float32)
    tl.store(out + row, (tl.sum(sums, axis=0) / divisor).to(out.dtype.element_ty))


def row_sum(x: torch.Tensor, dtype: torch.dtype, mean: bool = False) -> torch.Tensor:
    """The sum, or mean, of each row of x [R, C] (bf16, fp16 or fp32; packed) as `dtype`: [R]."""
    rows, cols = x.shape
    out = torch.empty(rows, dtype=dtype, device=x.device)
    if rows and cols:
        block = min(_WIDEST, triton.next_power_of_2(cols))
        _row_sum[(rows,)](x, out, cols, float(cols if mean else 1), BLOCK=block, num_warps=4)
    else:
        out.fill_(float("nan") if mean else 0)
    return out
