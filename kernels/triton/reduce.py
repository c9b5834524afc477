"""Sums and means of rows: out[r] = round(sum over c of x[r, c] / divisor), for x [R, C] in bf16, fp16 or fp32.

Order: lane i of BLOCK adds columns i, i + BLOCK, ... in fp32, ascending; then one program sums the lanes. BLOCK and
the number of rows per program depend on C alone.
"""

import torch
import triton
import triton.language as tl

_WIDEST = 2048
_TOGETHER = 1024  # elements per program: short rows share a program


@triton.jit(do_not_specialize=["rows"])
def _row_sum(x, out, rows, cols, divisor, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, cols, BLOCK):
        mask = (row[:, None] < rows) & (start + c[None, :] < cols)
        sums += tl.load(x + row[:, None] * cols + start + c[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row, (tl.sum(sums, axis=1) / divisor).to(out.dtype.element_ty), mask=row < rows)


def row_sum(x: torch.Tensor, dtype: torch.dtype, mean: bool = False) -> torch.Tensor:
    """The sum or the mean of each row of contiguous x [R, C] (bf16, fp16 or fp32) -> [R], of `dtype`."""
    rows, cols = x.shape
    out = torch.empty(rows, dtype=dtype, device=x.device)
    if x.data_ptr() % 16:
        x = x.clone()  # unaligned, Triton compiles other loads and sums the lanes in another order
    if rows and cols:
        block = min(_WIDEST, triton.next_power_of_2(cols))
        together = max(1, _TOGETHER // block)
        grid = (triton.cdiv(rows, together),)
        _row_sum[grid](x, out, rows, cols, float(cols if mean else 1), ROWS=together, BLOCK=block, num_warps=4)
    else:
        out.fill_(float("nan") if mean else 0)
    return out
