"""One product for each head: out[h] = a[h] @ b[h], for MLA's absorbed products.

a [H, M, K], b [H, K, N], out [H, M, N], in bf16 or fp16, each with any strides; K and N of b are multiples of 16.

Order of one element: a program adds products over ascending K, BLOCK_K at a time, in one fp32 accumulator, and rounds
once. The tile depends on H, K and N only, so a row's bits do not depend on the number of rows.
"""

import torch
import triton
import triton.language as tl

BLOCK_M, BLOCK_K = 64, 64


@triton.jit(do_not_specialize=["rows"])
def _heads(
    a, b, out, rows, stride_ah, stride_am, stride_ak, stride_bh, stride_bk, stride_bn, stride_oh, stride_om, stride_on,
    COLS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(2).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    m64 = m.to(tl.int64)
    a_at = a + head * stride_ah + m64[:, None] * stride_am + k[None, :] * stride_ak
    b_at = b + head * stride_bh + k[:, None].to(tl.int64) * stride_bk + n[None, :] * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, DEPTH, BLOCK_K):
        x = tl.load(a_at, mask=(m[:, None] < rows) & (first + k[None, :] < DEPTH), other=0.0)
        y = tl.load(b_at, mask=(first + k[:, None] < DEPTH) & (n[None, :] < COLS), other=0.0)
        acc = tl.dot(x, y, acc)
        a_at += BLOCK_K * stride_ak
        b_at += BLOCK_K * stride_bk
    at = out + head * stride_oh + m64[:, None] * stride_om + n[None, :] * stride_on
    tl.store(at, acc.to(out.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < COLS))


def block_n(heads: int, depth: int, cols: int) -> int:
    """Columns of a tile. Few heads leave the GPU idle with large tiles, above all where a long sum has few columns."""
    if heads > 32:
        return 128
    return 32 if depth > cols else 64


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write a @ b, head by head, to `out`, and return it."""
    heads, rows, depth = a.shape
    cols = b.shape[2]
    wide = block_n(heads, depth, cols)
    grid = (triton.cdiv(cols, wide), triton.cdiv(rows, BLOCK_M), heads)
    if rows:
        _heads[grid](
            a, b, out, rows, *a.stride(), *b.stride(), *out.stride(), COLS=cols, DEPTH=depth, BLOCK_M=BLOCK_M,
            BLOCK_N=wide, BLOCK_K=BLOCK_K, num_warps=4, num_stages=3,
        )  # fmt: skip
    return out
