"""RMSNorm of rows that ranks share: each rank has some columns of a row, in bf16, fp16 or fp32; rounded once.

`square_sums`: sums[r, at] = sum(x[r]^2) of this rank's columns, in fp32. The ranks add their sums elsewhere, in rank
order. `norm`: out[r] = round(x[r] * rsqrt(sums[r, at] / count + eps) * weight), where `count` is the number of columns
of all ranks.

Order: one program sums a row, as in norm.py: the tile depends on the number of this rank's columns alone.
"""

import torch
import triton
import triton.language as tl

from .launch import Launcher, empty
from .norm import shape_of

_PARTS = 2  # sums of a row: of its queries, and of its keys


@triton.jit
def _square_sums(x, sums, rows, cols, stride_row, at, BLOCK: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for chunk in tl.static_range(CHUNKS):
        c = chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = (r[:, None] < rows) & (c < cols)
        values = tl.load(x + (r * stride_row)[:, None] + c, mask=mask, other=0.0).to(tl.float32)
        squares += values * values
    tl.store(sums + r * 2 + at, tl.sum(squares, axis=1), mask=r < rows)


@triton.jit
def _norm(
    x,
    sums,
    weight,
    out,
    rows,
    cols,
    stride_row,
    at,
    count,
    eps,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.load(sums + r * 2 + at, mask=r < rows, other=0.0)
    scale = tl.rsqrt(total / count + eps)[:, None]
    for chunk in tl.static_range(CHUNKS):
        c = chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
        mask = (r[:, None] < rows) & (c < cols)
        values = tl.load(x + (r * stride_row)[:, None] + c, mask=mask, other=0.0).to(tl.float32)
        normed = values * scale * tl.load(weight + c, mask=c < cols, other=0.0).to(tl.float32)
        tl.store(out + (r * cols)[:, None] + c, normed.to(out.dtype.element_ty), mask=mask)


_launch_square_sums, _launch_norm = Launcher(_square_sums), Launcher(_norm)


def square_sums(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The sums of squares of the rows of q [T, A] and of k [T, B] -> fp32 [T, 2]. Columns are contiguous."""
    sums = torch.empty((q.shape[0], _PARTS), dtype=torch.float32, device=q.device)
    for at, x in enumerate((q, k)):
        rows, cols = x.shape
        if not rows:
            continue
        block, per_program, chunks, warps = shape_of(cols)
        _launch_square_sums(
            (-(-rows // per_program), 1),
            (x, sums),
            rows,
            (cols, x.stride(0), at),
            (block, per_program, chunks),
            warps,
        )
    return sums


def norm(x: torch.Tensor, sums: torch.Tensor, at: int, weight: torch.Tensor, eps: float, count: int) -> torch.Tensor:
    """RMSNorm of x [T, C] times weight [C] -> [T, C], in x's dtype, contiguous.

    sums: fp32 [T, 2], of which column `at` holds the sums of squares over all ranks. count: columns of all ranks.
    Columns of x are contiguous.
    """
    rows, cols = x.shape
    out = empty(x, x.shape)
    if not rows:
        return out
    block, per_program, chunks, warps = shape_of(cols)
    _launch_norm(
        (-(-rows // per_program), 1),
        (x, sums, weight, out),
        rows,
        (cols, x.stride(0), at, count, float(eps)),
        (block, per_program, chunks),
        warps,
    )
    return out
