"""Pooling of rows in bf16, fp16 or fp32; computed in fp32, rounded once.

l2_normalize: out[r] = x[r] / max(sqrt(sum(x[r]^2)), eps). mean_rows: out[s] = the mean of the rows of x from starts[s]
to starts[s + 1].

Order: l2_normalize: one program sums a row; lane i of BLOCK adds the squares of columns i, i + BLOCK, ..., ascending,
then the lanes are summed. BLOCK depends on C alone. mean_rows: one program sums a block of columns of one sequence. It
takes the sequence's rows in tiles of ROWS, which start at the sequence's first row: the rows of a tile are summed, and
the tiles' sums are added, ascending. The sum is then divided by the number of rows. So neither order depends on other
rows or sequences.
"""

import torch
import triton
import triton.language as tl

_WIDEST = 4096
_ROWS, _COLUMNS = 32, 64


@triton.jit(do_not_specialize=["rows"])
def _l2_normalize(x, out, rows, cols, stride_row, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, cols, BLOCK):
        mask = (row[:, None] < rows) & (start + c[None, :] < cols)
        v = tl.load(x + row[:, None] * stride_row + start + c[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += v * v
    length = tl.sqrt(tl.sum(squares, axis=1))
    by = tl.where(length < eps, eps, length)[:, None]  # a NaN stays a NaN
    for start in range(0, cols, BLOCK):
        mask = (row[:, None] < rows) & (start + c[None, :] < cols)
        v = tl.load(x + row[:, None] * stride_row + start + c[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row[:, None] * cols + start + c[None, :], (v / by).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _mean_rows(x, starts, out, cols, stride_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    sequence = tl.program_id(0)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(starts + sequence).to(tl.int64)
    count = (tl.load(starts + sequence + 1) - first).to(tl.int32)
    r = tl.arange(0, ROWS)
    sums = tl.zeros((COLUMNS,), dtype=tl.float32)
    for at in range(0, count, ROWS):
        mask = (at + r[:, None] < count) & (c[None, :] < cols)
        tile = tl.load(x + (first + at + r)[:, None] * stride_row + c[None, :], mask=mask, other=0.0)
        sums += tl.sum(tile.to(tl.float32), axis=0)
    tl.store(out + sequence.to(tl.int64) * cols + c, sums / count.to(tl.float32), mask=c < cols)


def l2_normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., C] (bf16, fp16 or fp32) divided by the L2 norm of its row, or by eps if the norm is smaller."""
    cols = x.shape[-1]
    flat = x if x.dim() == 2 and x.stride(-1) == 1 else x.reshape(-1, cols).contiguous()
    if flat.data_ptr() % 16 or flat.stride(0) != cols:
        flat = flat.clone(memory_format=torch.contiguous_format)  # Triton compiles other loads for other alignments
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = flat.shape[0]
    if rows:
        block = min(_WIDEST, triton.next_power_of_2(cols))
        together = max(1, 1024 // block)
        grid = (triton.cdiv(rows, together),)
        _l2_normalize[grid](flat, out, rows, cols, cols, eps, ROWS=together, BLOCK=block, num_warps=4)
    return out


def mean_rows(x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """The mean of each sequence's rows of x [tokens, C] (bf16, fp16 or fp32) -> fp32 [sequences, C].

    starts: int32 or int64 [sequences + 1] on x's device: sequence s has the rows from starts[s] to starts[s + 1].
    """
    x = x if x.stride(-1) == 1 and not x.data_ptr() % 16 else x.clone(memory_format=torch.contiguous_format)
    count, cols = starts.shape[0] - 1, x.shape[1]
    out = torch.empty((count, cols), dtype=torch.float32, device=x.device)
    if count:
        grid = (count, triton.cdiv(cols, _COLUMNS))
        _mean_rows[grid](x, starts, out, cols, x.stride(0), ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4)
    return out
