"""Experts in 8-bit floats with a scale for each block: out[i, n] = round(sum over k of x[r, k] * w[e, n, k], scaled).

Row i is a token with one of its experts e, and r = i // per. x [tokens, K] and w [experts, N, K] are e4m3, contiguous
along K. Scales are fp32: one for each row and group of 128 of x, one for each block of 128 x 128 of w. out
[tokens * per, N] is bf16, fp16 or fp32. In the second product, the router's weight of i multiplies the sum.

Order of one output: that of kernels/triton/scaled_gemm.py by groups. Each group of 128 of K is a sum of its own on the
tensor cores. Sums times the product of their two scales are added in ascending order into one fp32 accumulator, with
one rounding each (fma). The router's weight multiplies in fp32, and the result is rounded once. No tile splits K or a
group. Tiles have equal bits if the device's matrix instructions add in the same order for each, which a certificate
checks per device.

Hopper's fast instructions take at least 64 rows of their first operand, which is w if SWAP: few rows of x cost less so.
The scales of the next group are loaded while the tensor cores work on this group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GROUP = 128  # of K, and of N
GROUP_K = tl.constexpr(GROUP)


@triton.jit
def _scale(x_scale, w_scale, step, steps, held, stride_k):
    """The product [M] of both scales of a group, of the last group for a step past the end."""
    step = tl.minimum(step, steps - 1)
    return tl.load(x_scale + step * stride_k, mask=held, other=0.0) * tl.load(w_scale + step)


@triton.jit(do_not_specialize=["valid", "stride_xs", "stride_xs_k", "stride_wse", "stride_ws", "together"])
def _tile(
    x,
    w,
    out,
    x_scale,
    w_scale,
    weights,
    rows_ptr,
    experts_ptr,
    padded_ptr,
    valid,
    cols,
    depth,
    stride_x,
    stride_we,
    stride_w,
    stride_out,
    stride_xs,
    stride_xs_k,
    stride_wse,
    stride_ws,
    together,
    PER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SORTED: tl.constexpr,
    EVEN: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tl.static_assert(BLOCK_N <= GROUP_K)  # one scale of w for a tile and a group
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(tl.load(padded_ptr), BLOCK_M)
    tiles_n = tl.cdiv(cols, BLOCK_N)
    if pid >= tiles_m * tiles_n:
        return
    # Neighbours share rows of w in the L2 cache.
    first = pid // (together * tiles_n) * together
    wide = tl.minimum(tiles_m - first, together)
    tile_m = first + pid % (together * tiles_n) % wide
    tile_n = pid % (together * tiles_n) // wide
    m = tl.arange(0, BLOCK_M)
    if SORTED:
        i = tl.load(rows_ptr + tile_m * BLOCK_M + m).to(tl.int64)
    else:
        i = tl.where(m == 0, tile_m, valid).to(tl.int64)
    there = i < valid
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    target = out + i[:, None] * stride_out + n[None, :]
    kept = there[:, None] & (n[None, :] < cols)
    expert = tl.load(experts_ptr + tile_m).to(tl.int64)
    if expert == -1:  # of another rank
        tl.store(target, tl.zeros((BLOCK_M, BLOCK_N), out.dtype.element_ty), mask=kept)
        return
    k = tl.arange(0, GROUP_K)
    at_n = n % cols  # rows of w past the end load a valid row again
    x_tile = x + (i // PER * stride_x)[:, None] + k[None, :]
    w_tile = w + expert * stride_we + (at_n.to(tl.int64) * stride_w)[:, None] + k[None, :]
    xs = x_scale + i // PER * stride_xs
    ws = w_scale + expert * stride_wse + tile_n * BLOCK_N // GROUP_K * stride_ws
    steps = tl.cdiv(depth, GROUP_K)
    if SWAP:
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    scale = _scale(xs, ws, 0, steps, there, stride_xs_k)
    for step in range(steps):
        if EVEN:
            a = tl.load(x_tile, mask=there[:, None], other=0.0)
            b = tl.load(w_tile)
        else:
            inside = k[None, :] < depth - step * GROUP_K
            a = tl.load(x_tile, mask=there[:, None] & inside, other=0.0)
            b = tl.load(w_tile, mask=inside, other=0.0)
        following = _scale(xs, ws, step + 1, steps, there, stride_xs_k)
        if SWAP:
            group = tl.dot(b, a.T)
            total = tl.fma(group, tl.broadcast_to(scale[None, :], group.shape), total)
        else:
            group = tl.dot(a, b.T)
            total = tl.fma(group, tl.broadcast_to(scale[:, None], group.shape), total)
        scale = following
        x_tile += GROUP_K
        w_tile += GROUP_K
    if SWAP:
        total = total.T
    if WEIGHTED:
        total *= tl.load(weights + i, mask=there, other=0.0)[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=kept)


def products(
    x: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    weights: torch.Tensor | None,
    rows: torch.Tensor | None,
    experts: torch.Tensor,
    padded: torch.Tensor,
    per: int,
    tile: dict[str, int],
    swap: bool,
) -> None:
    """Write the products of all rows into out [tokens, per, N] or [tokens * per, 1, N].

    x [tokens, K], x_scale [tokens, K / 128] rounded up, w_scale [experts, N / 128, K / 128] rounded up. weights: fp32,
    contiguous, one for each row, or None. rows: int32, the rows of each block of the tile's rows, sorted by expert; a
    number that is no row pads a block. None: a block for each row. experts: int32, the expert of each block, -1 for an
    expert of another rank, which writes zeros. padded: int32 [1], the rows of all blocks, padding included. tile:
    vLLM's names of block sizes and launch options, with at most 128 rows of w. Raises ValueError for other strides and
    scales.
    """
    if not x.stride(1) == w.stride(2) == out.stride(2) == 1 or not w_scale.dtype == x_scale.dtype == torch.float32:
        raise ValueError("products: x, w and out are contiguous along their last dimension, and scales are fp32")
    if w_scale.stride(2) != 1 < w_scale.shape[2]:
        raise ValueError("products: scales of w are contiguous along their last dimension")
    tokens, valid = x.shape[0], x.shape[0] * per
    _, cols, depth = w.shape
    size = tile["BLOCK_SIZE_M"]
    blocks = valid
    if rows is not None:
        # A token chooses an expert once, so few tokens leave most experts without a block.
        blocks = triton.cdiv(rows.shape[0] if tokens >= size else min(rows.shape[0], valid * size), size)
    _tile[(blocks * triton.cdiv(cols, tile["BLOCK_SIZE_N"]),)](
        x,
        w,
        out,
        x_scale,
        w_scale,
        x_scale if weights is None else weights,
        experts if rows is None else rows,
        experts,
        padded,
        valid,
        cols,
        depth,
        x.stride(0),
        w.stride(0),
        w.stride(1),
        out.stride(1),
        x_scale.stride(0),
        x_scale.stride(1),
        w_scale.stride(0),
        w_scale.stride(1),
        tile["GROUP_SIZE_M"],
        PER=per,
        WEIGHTED=weights is not None,
        SORTED=rows is not None,
        EVEN=depth % GROUP == 0,
        SWAP=swap,
        BLOCK_M=size,
        BLOCK_N=tile["BLOCK_SIZE_N"],
        num_warps=tile.get("num_warps", 4),
        num_stages=tile.get("num_stages", 3),
    )
