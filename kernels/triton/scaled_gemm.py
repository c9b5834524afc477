"""GEMM of scaled 8-bit floats: out[m, n] = round(sum over k of x[m, k] * w[n, k], times the scales, + bias[n]).

x [M, K] and w [N, K] are e4m3 and contiguous along K. Scales are fp32. out and bias are bf16 or fp16.

By rows: x_scale [M], one for each row of x; w_scale [N], one for each row of w. By groups of 128: x_scale [M, K / 128],
one for each row and group of K; w_scale [ceil(N / 128), K / 128], one for each block of 128 x 128.

Order of one output, by rows: the tensor cores take K in ascending order into one accumulator, in one pass. The sum is
multiplied by w's scale, then by x's. By groups: each group of 128 is a sum of its own on the tensor cores; sums times
the product of their two scales are added in ascending order into one fp32 accumulator, with one rounding each (fma).
The bias is added in fp32, and the result is rounded once. No tile splits K or a group, so the tile may depend on M, N
and K. Tiles have equal bits if the device's matrix instructions add in the same order for each, which a certificate
checks per device.

Hopper's fast instructions take at least 64 rows of their first operand, which is w if SWAP: few rows of x cost less so.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .gemm import _swizzle, count

GROUP_K = 128


class Tile(NamedTuple):
    """Block sizes and launch options of one variant.

    swap: the product is computed transposed. persistent: programs per multiprocessor, with tensor descriptors; 0: one
    program for each tile, with pointers.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    swap: bool = False
    persistent: int = 0


# These tiles define the order: every other variant is compared with them.
REFERENCE = Tile(128, 128, 128, 8, 3)


@triton.jit
def _scaled(total, m, n, x_scale, w_scale, bias, rows, cols, HAS_BIAS: tl.constexpr):
    """A sum [M, N] times the scales of its columns, then those of its rows, plus the bias."""
    xs = tl.load(x_scale + m, mask=m < rows, other=0.0)[:, None]
    ws = tl.load(w_scale + n, mask=n < cols, other=0.0)[None, :]
    first = total * ws
    if HAS_BIAS:
        added = tl.load(bias + n, mask=n < cols, other=0.0).to(tl.float32)[None, :]
        return tl.fma(first, tl.broadcast_to(xs, first.shape), tl.broadcast_to(added, first.shape))
    return first * xs


@triton.jit(do_not_specialize=["rows"])
def _tile(
    x,
    w,
    x_scale,
    w_scale,
    bias,
    out,
    rows,
    cols,
    depth,
    stride_x,
    stride_w,
    stride_out,
    stride_xs_m,
    stride_xs_k,
    stride_ws_n,
    HAS_BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_m, tile_n = _swizzle(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N), GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end load a valid row again, which is cheaper than a mask. They are not stored. Few rows take a mask:
    # many loads of one row wait for each other.
    at_m = m % rows
    at_n = n % cols
    x_tile = x + at_m.to(tl.int64)[:, None] * stride_x + k[None, :]
    w_tile = w + at_n.to(tl.int64)[:, None] * stride_w + k[None, :]
    if SWAP:
        total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            if SWAP:
                a = tl.load(x_tile, mask=m[:, None] < rows, other=0.0)
            else:
                a = tl.load(x_tile)
            b = tl.load(w_tile)
        else:
            a = tl.load(x_tile, mask=(m[:, None] < rows) & (k[None, :] < depth - start), other=0.0)
            b = tl.load(w_tile, mask=k[None, :] < depth - start, other=0.0)
        if GROUPED:
            step = start // BLOCK_K
            xs = tl.load(x_scale + at_m * stride_xs_m + step * stride_xs_k)
            ws = tl.load(w_scale + (at_n // BLOCK_K) * stride_ws_n + step)
            if SWAP:
                total = tl.fma(tl.dot(b, a.T), ws[:, None] * xs[None, :], total)
            else:
                total = tl.fma(tl.dot(a, b.T), xs[:, None] * ws[None, :], total)
        elif SWAP:
            total = tl.dot(b, a.T, total)
        else:
            total = tl.dot(a, b.T, total)
        x_tile += BLOCK_K
        w_tile += BLOCK_K
    if SWAP:
        total = total.T
    if GROUPED:
        if HAS_BIAS:
            total += tl.load(bias + n, mask=n < cols, other=0.0).to(tl.float32)[None, :]
    else:
        total = _scaled(total, m, n, x_scale, w_scale, bias, rows, cols, HAS_BIAS)
    target = out + m.to(tl.int64)[:, None] * stride_out + n[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < cols))


@triton.jit(do_not_specialize=["rows"])
def _persistent(
    x,
    w,
    x_scale,
    w_scale,
    bias,
    out,
    rows,
    cols,
    depth,
    stride_xs_m,
    stride_xs_k,
    stride_ws_n,
    HAS_BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(cols, BLOCK_N)
    steps = tl.cdiv(depth, BLOCK_K)
    for pid in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = _swizzle(pid, tiles_m, tiles_n, GROUP)
        # The last row of tiles begins early, because loads past the last row are slow. Rows that two tiles compute have
        # the same bits in both.
        first = tl.minimum(tile_m * BLOCK_M, tl.maximum(rows - BLOCK_M, 0))
        m = first + tl.arange(0, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps):
            # Elements outside x and w load as zeros.
            a = x.load([first, step * BLOCK_K])
            b = w.load([tile_n * BLOCK_N, step * BLOCK_K])
            if GROUPED:
                xs = tl.load(x_scale + m * stride_xs_m + step * stride_xs_k, mask=m < rows, other=0.0)
                ws = tl.load(w_scale + (n // BLOCK_K) * stride_ws_n + step, mask=n < cols, other=0.0)
                total = tl.fma(tl.dot(a, b.T), xs[:, None] * ws[None, :], total)
            else:
                total = tl.dot(a, b.T, total)
        if GROUPED:
            if HAS_BIAS:
                total += tl.load(bias + n, mask=n < cols, other=0.0).to(tl.float32)[None, :]
        else:
            total = _scaled(total, m, n, x_scale, w_scale, bias, rows, cols, HAS_BIAS)
        out.store([first, tile_n * BLOCK_N], total.to(out.dtype))


def fit(tile: Tile, shared: int) -> Tile:
    """Reduce the stages of `tile` so that it takes at most `shared` bytes of shared memory, if possible."""
    if tile.persistent:
        shared -= tile.m * tile.n * 2  # stores pass through shared memory
    while tile.stages > 2 and (tile.m + tile.n) * tile.k * tile.stages > shared:
        tile = tile._replace(stages=tile.stages - 1)
    return tile


# Variants that may serve, besides the reference. Which is the fastest depends on the sizes: a certificate times them.
TILES = (
    Tile(16, 64, 256, 4, 5, True),
    Tile(16, 128, 128, 4, 6, True),
    Tile(32, 64, 256, 4, 4, True),
    Tile(64, 64, 256, 4, 3, True),
    Tile(64, 64, 128, 4, 5, True),
    Tile(64, 128, 128, 4, 5),
    Tile(64, 128, 128, 4, 5, False, 1),
    Tile(128, 128, 128, 8, 4, False, 1),
    Tile(128, 256, 128, 8, 3, False, 1),
)


def able(tile: Tile, rows: int, grouped: bool) -> bool:
    """Whether a variant can be the fastest for a number of rows."""
    if grouped and tile.k != GROUP_K:
        return False
    return tile.m // 4 < rows <= 4 * tile.m or (tile.m == 16 and rows <= 16) or (tile.persistent > 0 and rows > 512)


def choose(rows: int, cols: int, shared: int, descriptors: bool, grouped: bool = False) -> Tile:
    """A good tile for x [rows, K] and w [cols, K] that nobody timed. shared: bytes of shared memory that a block may
    use. descriptors: whether the call may use tensor descriptors."""
    if rows <= 16:
        tile = TILES[1 if grouped else 0]
    elif rows <= 64:
        tile = TILES[5] if grouped else TILES[2]
    elif descriptors:
        tile = TILES[8] if rows > 512 and not grouped else TILES[7] if rows > 128 else TILES[6]
    else:
        tile = REFERENCE
    return fit(tile, shared)


def gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
) -> torch.Tensor:
    """The scaled product of x [M, K] and weight [N, K], both e4m3 -> [M, N] of dtype, bf16 or fp16.

    x_scale [M, K / 128] and weight_scale [ceil(N / 128), K / 128]: by groups, and the tile's k is 128. Else x_scale [M]
    and weight_scale [N]: by rows. A persistent tile needs bases and rows aligned to 16 bytes.
    """
    rows, depth = x.shape
    cols = weight.shape[0]
    out = torch.empty((rows, cols), dtype=dtype, device=x.device)
    if rows == 0 or cols == 0:
        return out
    grouped = weight_scale.dim() == 2
    if grouped:
        tile = tile._replace(k=GROUP_K)
    strides = (x_scale.stride(0), x_scale.stride(1), weight_scale.stride(0)) if grouped else (1, 1, 1)
    given = {
        "HAS_BIAS": bias is not None,
        "GROUPED": grouped,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "GROUP": 8,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    scales = x_scale, weight_scale, bias if bias is not None else x
    if tile.persistent:
        from triton.tools.tensor_descriptor import TensorDescriptor

        programs = torch.cuda.get_device_properties(x.device).multi_processor_count * tile.persistent
        _persistent[(min(programs, count(tile, rows, cols)),)](
            TensorDescriptor.from_tensor(x, [tile.m, tile.k]),
            TensorDescriptor.from_tensor(weight, [tile.n, tile.k]),
            *scales,
            TensorDescriptor.from_tensor(out, [tile.m, tile.n]),
            rows,
            cols,
            depth,
            *strides,
            **given,
        )
        return out
    _tile[(count(tile, rows, cols),)](
        x,
        weight,
        *scales,
        out,
        rows,
        cols,
        depth,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        *strides,
        SWAP=tile.swap,
        EVEN_K=depth % tile.k == 0,
        **given,
    )
    return out
