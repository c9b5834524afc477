"""A trial: all leaves of K (bi_patch/kernels/triton/leaves.py) in one loop, so that loads never stop between leaves.

Order of one output: that of kernels/triton/leaves.py. A leaf's fp32 sum takes K in ascending order. Sums of leaves are
added as a binary counter carries: after leaf 7, ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)). The leaves of a tile may be
cut into groups, whole subtrees with a program of their own: only the groups' roots go through memory.
"""

import torch
import triton
import triton.language as tl

from bi_patch.kernels.triton import gemm
from bi_patch.kernels.triton.leaves import _finish, tree


@triton.jit(do_not_specialize=["rows"])
def _flat(
    x,
    w,
    bias,
    out,
    rows,
    cols,
    stride_x,
    stride_w,
    STEPS: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_m, tile_n = gemm._swizzle(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N), GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    group = tl.program_id(1)
    x += group * STEPS * COUNT * BLOCK_K
    w += group * STEPS * COUNT * BLOCK_K
    out += group.to(tl.int64) * rows * cols
    x_tile = x + (m % rows).to(tl.int64)[:, None] * stride_x + k[None, :]
    w_tile = w + (n % cols).to(tl.int64)[None, :] * stride_w + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    one = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    two = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    four = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(STEPS * COUNT):
        total = tl.dot(tl.load(x_tile), tl.load(w_tile), total, input_precision="ieee")
        x_tile += BLOCK_K
        w_tile += BLOCK_K
        if COUNT > 1 and i % STEPS == STEPS - 1:
            leaf = i // STEPS
            if leaf % 2 == 0:
                one = total
            else:
                one += total
                if leaf % 4 == 1:
                    two = one
                else:
                    two += one
                    if leaf == 3:
                        four = two
                    else:
                        four += two
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    root = one
    if COUNT == 1:
        root = total
    if COUNT == 4:
        root = two
    if COUNT == 8:
        root = four
    _finish(root, bias, out, m, n, rows, cols, HAS_BIAS)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    leaves: int,
    dtype: torch.dtype,
    groups: int,
    blocks: gemm.Tile,
) -> torch.Tensor:
    """x [M, K] @ weight [N, K].T (+ bias [N]) in up to 8 leaves -> [M, N] of `dtype`: fp32 for a subtree's root.

    groups: of leaves, a power of two.
    """
    (rows, depth), cols = x.shape, weight.shape[0]
    kind = dtype if groups == 1 else torch.float32
    out = torch.empty((groups, rows, cols), dtype=kind, device=x.device)
    _flat[(gemm.count(blocks, rows, cols), groups)](
        x,
        weight,
        bias if bias is not None else x,
        out,
        rows,
        cols,
        x.stride(0),
        weight.stride(0),
        STEPS=depth // leaves // blocks.k,
        COUNT=leaves // groups,
        HAS_BIAS=bias is not None and groups == 1,
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_K=blocks.k,
        GROUP=8,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return out[0] if groups == 1 else tree(out, bias, dtype)
