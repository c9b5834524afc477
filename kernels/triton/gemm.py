"""GEMM in canonical order: out[m, n] = round(sum over k of x[m, k] * w[n, k] + bias[n]).

x [M, K], w [N, K], bias [N] or none, out [M, N], all bf16, fp16 or fp32; the last dimension is contiguous.

Order of one output: one fp32 accumulator takes K in ascending order in one pass; the bias is added in fp32; the result
is rounded once. The tile may depend on M, N and K, because no tile splits K. Tiles have equal bits if the device's
matrix instructions add in the same order for each, which a certificate checks per device.

`_tile` loads through pointers and runs on every architecture, with small tiles for few rows and large tiles for many.
`_persistent` loads through tensor descriptors (TMA on Hopper and later) and runs a fixed number of programs per
multiprocessor. Both follow Triton's tutorials 03 and 09 (github.com/triton-lang/triton).
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """Block sizes and launch options of one kernel variant.

    persistent: programs per multiprocessor of `_persistent`; 0 selects `_tile`.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    persistent: int = 0


# These tiles define the order: every other variant is compared with them.
REFERENCE = Tile(128, 128, 64, 8, 3)
REFERENCE_FP32 = Tile(64, 64, 32, 4, 2)


@triton.jit
def _swizzle(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile coordinates of program `pid`. Groups of GROUP rows of tiles run together and share the L2 cache."""
    per_group = GROUP * tiles_n
    first = (pid // per_group) * GROUP
    size = min(tiles_m - first, GROUP)
    return first + (pid % per_group) % size, (pid % per_group) // size


# One compiled kernel for every number of rows: Triton would compile a slower kernel for rows == 1.
@triton.jit(do_not_specialize=["rows"])
def _tile(
    x,
    w,
    bias,
    out,
    rows,
    cols,
    depth,
    stride_x,
    stride_w,
    stride_out,
    HAS_BIAS: tl.constexpr,
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
    # Rows past the end load a valid row again, which is cheaper than a mask. They are not stored.
    x_tile = x + (m % rows).to(tl.int64)[:, None] * stride_x + k[None, :]
    w_tile = w + (n % cols).to(tl.int64)[None, :] * stride_w + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_tile)
            b = tl.load(w_tile)
        else:
            a = tl.load(x_tile, mask=k[None, :] < depth - start, other=0.0)
            b = tl.load(w_tile, mask=k[:, None] < depth - start, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        x_tile += BLOCK_K
        w_tile += BLOCK_K
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < cols, other=0.0).to(tl.float32)[None, :]
    target = out + m.to(tl.int64)[:, None] * stride_out + n[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < cols))


@triton.jit(do_not_specialize=["rows"])
def _persistent(
    x,
    w,
    bias,
    out,
    rows,
    cols,
    depth,
    HAS_BIAS: tl.constexpr,
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
        m = tl.minimum(tile_m * BLOCK_M, tl.maximum(rows - BLOCK_M, 0))
        n = tile_n * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps):
            # Elements outside x and w load as zeros.
            a = x.load([m, step * BLOCK_K])
            b = w.load([n, step * BLOCK_K])
            total = tl.dot(a, b.T, total, input_precision="ieee")
        if HAS_BIAS:
            at = n + tl.arange(0, BLOCK_N)
            total += tl.load(bias + at, mask=at < cols, other=0.0).to(tl.float32)[None, :]
        out.store([m, n], total.to(out.dtype))


# Microseconds per wave (one tile on every multiprocessor) and 1024 elements of K, on an H100: medians of
# benchmarks/hopper/tune_gemm.py for sizes that memory does not bound. LAUNCH: microseconds per launch.
WAVES = {
    Tile(128, 256, 64, 8, 3, 1): 10.0,
    Tile(128, 128, 64, 4, 5, 1): 5.5,
    Tile(64, 128, 128, 4, 4, 1): 3.6,
    Tile(64, 64, 128, 4, 6, 1): 2.4,
    Tile(64, 32, 128, 4, 6, 1): 2.0,
}
LAUNCH = 2.0
_DOWN = min(tile.m for tile in WAVES)  # divides the rows of every tile above


class Part(NamedTuple):
    """A range of the output's columns, from the previous part's end to `end`, and its tile."""

    tile: Tile
    end: int


def choose(
    rows: int, cols: int, depth: int, element_size: int, shared: int, processors: int, descriptors: bool
) -> tuple[Part, ...]:
    """The fastest parts for x [rows, depth] and w [cols, depth], in ascending order of columns.

    element_size: bytes per element. shared: bytes of shared memory that a block may use. processors: multiprocessors.
    descriptors: whether the call may use tensor descriptors.
    """
    if element_size == 4:
        tile = Tile(16, 32, 64, 4, 3) if rows <= 32 else REFERENCE_FP32
    elif rows <= 16 or rows <= 32 and cols <= 2048:
        narrow = cols <= (2048 if rows == 1 else 8192)
        tile = Tile(16, 32, 256, 2, 5) if narrow else Tile(16, 64, 256, 4, 5)
    elif rows <= 32:
        tile = Tile(32, 32, 256, 4, 4) if cols <= 8192 else Tile(32, 128, 128, 4, 4)
    elif descriptors:
        best = _cheapest(triton.cdiv(rows, _DOWN) * _DOWN, cols, depth, processors)
        return tuple(Part(fit(tile, element_size, shared), end) for tile, end in best)
    elif rows <= 64:
        tile = Tile(64, 32, 128, 4, 5) if cols <= 8192 else Tile(64, 128, 64, 4, 5)
    elif rows <= 128:
        tile = Tile(64, 64, 128, 4, 4) if cols <= 8192 else Tile(128, 128, 64, 8, 4)
    elif rows <= 512 and cols <= 8192:
        tile = Tile(128, 64, 64, 4, 4)
    else:
        tile = Tile(128, 128, 64, 8, 3)
    return (Part(fit(tile, element_size, shared), cols),)


@functools.lru_cache(8192)
def _cheapest(rows: int, cols: int, depth: int, processors: int) -> tuple[Part, ...]:
    """The parts of least _cost. rows: rounded up to a multiple of _DOWN, which changes no number of waves."""
    return min(_covers(rows, cols, processors), key=lambda parts: _cost(parts, rows, depth, processors))


def _covers(rows: int, cols: int, processors: int) -> Iterator[tuple[Part, ...]]:
    """Every tile for all columns; and its full waves only, with every other tile for the remaining columns."""
    for tile in WAVES:
        yield (Part(tile, cols),)
        full = count(tile, rows, cols) // processors * processors
        cut = full // triton.cdiv(rows, tile.m) * tile.n
        if 0 < cut < cols:
            yield from ((Part(tile, cut), Part(rest, cols)) for rest in WAVES if rest != tile)


def _cost(parts: tuple[Part, ...], rows: int, depth: int, processors: int) -> float:
    """Estimated microseconds, if memory is not the bottleneck."""
    total, begin = 0.0, 0
    for tile, end in parts:
        waves = triton.cdiv(count(tile, rows, end - begin), processors)
        total += LAUNCH + WAVES[tile] * waves * depth / 1024
        begin = end
    return total


def count(tile: Tile, rows: int, cols: int) -> int:
    """The number of tiles of the output."""
    return triton.cdiv(rows, tile.m) * triton.cdiv(cols, tile.n)


def fit(tile: Tile, element_size: int, shared: int) -> Tile:
    """Reduce `tile` to at most `shared` bytes of shared memory: first its stages, then its depth."""
    if tile.persistent:
        shared -= tile.m * tile.n * element_size  # stores pass through shared memory
    while (tile.m + tile.n) * tile.k * element_size * tile.stages > shared:
        if tile.stages > 2:
            tile = tile._replace(stages=tile.stages - 1)
        elif tile.k > 32:
            tile = tile._replace(k=tile.k // 2)
        else:
            break
    return tile


def gemm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tile: Tile, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [M, K] @ weight [N, K].T (+ bias [N]) -> [M, N], all of one dtype: bf16, fp16 or fp32.

    The last dimension of x and weight must be contiguous. A persistent tile also needs bases and rows aligned to 16
    bytes (can_describe).
    """
    rows, depth = x.shape
    cols = weight.shape[0]
    if out is None:
        out = torch.empty((rows, cols), dtype=x.dtype, device=x.device)
    if rows == 0 or cols == 0:
        return out
    if tile.persistent:
        _launch_persistent(x, weight, bias, tile, out)
        return out
    _tile[(count(tile, rows, cols),)](
        x,
        weight,
        bias if bias is not None else x,
        out,
        rows,
        cols,
        depth,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        HAS_BIAS=bias is not None,
        EVEN_K=depth % tile.k == 0,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP=8,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    parts: Sequence[Part],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """gemm in parts: each part computes its columns with its own tile, in its own launch."""
    if len(parts) == 1:
        return gemm(x, weight, bias, parts[0].tile, out)
    if out is None:
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    begin = 0
    for tile, end in parts:
        gemm(x, weight[begin:end], None if bias is None else bias[begin:end], tile, out[:, begin:end])
        begin = end
    return out


def can_describe(tensor: torch.Tensor) -> bool:
    """Whether the tensor can have a tensor descriptor: base and rows aligned to 16 bytes."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0


def _launch_persistent(x, weight, bias, tile: Tile, out) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows, depth = x.shape
    cols = weight.shape[0]
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count * tile.persistent
    programs = min(programs, count(tile, rows, cols))
    _persistent[(programs,)](
        TensorDescriptor.from_tensor(x, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(weight, [tile.n, tile.k]),
        bias if bias is not None else x,
        TensorDescriptor.from_tensor(out, [tile.m, tile.n]),
        rows,
        cols,
        depth,
        HAS_BIAS=bias is not None,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        GROUP=8,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
