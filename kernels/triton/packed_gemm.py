"""GEMM with packed weights of 8 bits: out[m, n] = round(sum over k of x[m, k] * w[n, k] + bias[n]).

x [M, K], bias [N] or none and out [M, N] are bf16 or fp16. The weights w and their packing: kernels/packing.py.

Order of one output: that of kernels/triton/gemm.py for the weights w: one fp32 accumulator takes K in ascending order
in one pass, the bias is added in fp32, and the result is rounded once. So a GEMM of `dequantize`'s weights in that
order has the same bits, and either may serve any M. Tiles have equal bits if the device's matrix instructions add in
the same order for each, which a certificate checks per device.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..packing import BLOCK_K, STRIP, Packed
from .gemm import _swizzle


class Tile(NamedTuple):
    """Block sizes and launch options of one variant.

    swap: the product is computed transposed, w times x.
    """

    m: int
    n: int
    warps: int
    stages: int
    swap: bool = False

    def serves(self, rows: int) -> bool:
        """Whether this variant can be the fastest for a number of rows."""
        return self.m // 4 < rows <= 2 * self.m or self.m <= 16 and rows <= self.m


# Variants that may serve. A certificate compares and times them.
TILES = (
    Tile(16, 64, 4, 6, True),
    Tile(32, 64, 4, 5, True),
    Tile(64, 64, 4, 3, True),
)


def fit(tile: Tile, shared: int) -> Tile:
    """Reduce the stages of `tile` so that it takes at most `shared` bytes of shared memory, if possible."""
    while tile.stages > 2 and (2 * tile.m + tile.n) * BLOCK_K * tile.stages > shared:
        tile = tile._replace(stages=tile.stages - 1)
    return tile


@triton.jit
def _scales(scale, zero, at_n, at_k, cols, group, ZEROS: tl.constexpr, WHOLE: tl.constexpr):
    """Scales and zero points of rows at_n [N] for K at_k [64]: [N, 1] if WHOLE, one group, else [N, 64]."""
    if WHOLE:
        where = (tl.min(at_k, 0) // group) * cols + at_n[:, None]
    else:
        where = (at_k // group)[None, :] * cols + at_n[:, None]
    s = tl.load(scale + where)
    if ZEROS:
        z = tl.load(zero + where)
    else:
        z = tl.zeros((1, 1), s.dtype)
    return s, z


@triton.jit(do_not_specialize=["rows"])
def _tile(
    x,
    w,
    scale,
    zero,
    bias,
    out,
    rows,
    cols,
    depth,
    group,
    stride_x,
    HAS_BIAS: tl.constexpr,
    ZEROS: tl.constexpr,
    WHOLE: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    tile_m, tile_n = _swizzle(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N), GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    half = tl.arange(0, 64)
    # Rows of w past the end load a valid row again. They are not stored.
    at_n = n % cols
    x_tile = x + m.to(tl.int64)[:, None] * stride_x + half[None, :]
    w_tile = w + ((at_n // 16).to(tl.int64) * depth * 16 + (at_n % 16) * 128)[:, None] + half[None, :]
    there = m[:, None] < rows
    if SWAP:
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, depth, 128):
        a = tl.load(x_tile, mask=there, other=0.0)
        b = tl.load(x_tile + 64, mask=there, other=0.0)
        low, high = tl.load(w_tile), tl.load(w_tile + 64)
        s, z = _scales(scale, zero, at_n, start + half, cols, group, ZEROS, WHOLE)
        first = (low.to(dtype) - z) * s  # the difference is exact
        if not WHOLE:
            s, z = _scales(scale, zero, at_n, start + 64 + half, cols, group, ZEROS, WHOLE)
        second = (high.to(dtype) - z) * s
        if SWAP:
            total = tl.dot(first, a.T, total)
            total = tl.dot(second, b.T, total)
        else:
            total = tl.dot(a, first.T, total)
            total = tl.dot(b, second.T, total)
        x_tile += 128
        w_tile += 16 * 128
    if SWAP:
        total = total.T
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < cols, other=0.0).to(tl.float32)[None, :]
    target = out + m.to(tl.int64)[:, None] * cols + n[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=there & (n[None, :] < cols))


@triton.jit
def _dequantize(
    w,
    scale,
    zero,
    out,
    cols,
    depth,
    group,
    ZEROS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    dtype: tl.constexpr = out.dtype.element_ty
    at_n = tl.program_id(1) * 16 + tl.arange(0, 16)
    half = tl.arange(0, 64)
    for i in range(BLOCKS):
        block = tl.program_id(0) * BLOCKS + i
        if block * 128 < depth:
            at = w + (tl.program_id(1).to(tl.int64) * (depth // 128) + block) * 16 * 128
            at += (tl.arange(0, 16) * 128)[:, None] + half[None, :]
            low, high = tl.load(at), tl.load(at + 64)
            k = block * 128 + half
            s, z = _scales(scale, zero, at_n, k, cols, group, ZEROS, WHOLE)
            target = out + at_n.to(tl.int64)[:, None] * depth + k[None, :]
            tl.store(target, (low.to(dtype) - z) * s)
            s, z = _scales(scale, zero, at_n, k + 64, cols, group, ZEROS, WHOLE)
            tl.store(target + 64, (high.to(dtype) - z) * s)


def dequantize(packed: Packed) -> torch.Tensor:
    """The weights [N, K] in the type of the scales."""
    n, k = packed.shape
    out = torch.empty((n, k), dtype=packed.scale.dtype, device=packed.data.device)
    blocks = 4
    _dequantize[(triton.cdiv(k // BLOCK_K, blocks), n // STRIP)](
        packed.data,
        packed.scale,
        packed.zero if packed.zero is not None else packed.scale,
        out,
        n,
        k,
        packed.group,
        ZEROS=packed.zero is not None,
        WHOLE=packed.group % 64 == 0,
        BLOCKS=blocks,
        num_warps=4,
    )
    return out


def gemm(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, tile: Tile) -> torch.Tensor:
    """x [M, K] @ w.T (+ bias [N]) -> [M, N], in x's type, which is that of the scales. x is contiguous along K."""
    rows, depth = x.shape
    cols = packed.scale.shape[1]
    out = torch.empty((rows, cols), dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    _tile[(triton.cdiv(rows, tile.m) * triton.cdiv(cols, tile.n),)](
        x,
        packed.data,
        packed.scale,
        packed.zero if packed.zero is not None else packed.scale,
        bias if bias is not None else x,
        out,
        rows,
        cols,
        depth,
        packed.group,
        x.stride(0),
        HAS_BIAS=bias is not None,
        ZEROS=packed.zero is not None,
        WHOLE=packed.group % BLOCK_K == 0,
        SWAP=tile.swap,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        GROUP=8,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out
