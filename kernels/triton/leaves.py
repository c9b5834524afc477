"""GEMM of a rank's part of a row-parallel layer, in fixed parts of K: the same bits for every number of ranks.

x [M, K], w [N, K] (bf16 or fp16), bias [N] or none. K is cut into `leaves` equal parts, a power of two up to 8. Each is
a multiple of a kernel's step of K.

Order of one output: one fp32 accumulator takes a leaf's K in ascending order in one pass. Leaves are added in fp32 in a
binary tree: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)). A rank of n computes 8 / n leaves side by side, a whole subtree,
whose root stays in fp32. The roots of all ranks are added in the same tree, then the bias; the result is rounded once.

`_whole`: one program computes all leaves of a tile. `_each`: one program for each leaf, for few rows, and `_tree` adds.
"""

import torch
import triton
import triton.language as tl

from . import gemm

LEAVES = (1, 2, 4, 8)
FEW = 128  # up to this many rows, every leaf has programs of its own


@triton.jit
def _leaf(x_tile, w_tile, leaf, size, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    x_tile += leaf * size
    w_tile += leaf * size
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, size, BLOCK_K):
        total = tl.dot(tl.load(x_tile), tl.load(w_tile), total, input_precision="ieee")
        x_tile += BLOCK_K
        w_tile += BLOCK_K
    return total


@triton.jit
def _finish(total, bias, out, m, n, rows, cols, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < cols, other=0.0).to(tl.float32)[None, :]
    target = out + m.to(tl.int64)[:, None] * cols + n[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < cols))


@triton.jit(do_not_specialize=["rows"])
def _whole(
    x,
    w,
    bias,
    out,
    rows,
    cols,
    size,
    stride_x,
    stride_w,
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
    x_tile = x + (m % rows).to(tl.int64)[:, None] * stride_x + k[None, :]
    w_tile = w + (n % cols).to(tl.int64)[None, :] * stride_w + k[:, None]
    root = _leaf(x_tile, w_tile, 0, size, BLOCK_M, BLOCK_N, BLOCK_K)
    if COUNT >= 2:
        root += _leaf(x_tile, w_tile, 1, size, BLOCK_M, BLOCK_N, BLOCK_K)
    if COUNT >= 4:
        two = _leaf(x_tile, w_tile, 2, size, BLOCK_M, BLOCK_N, BLOCK_K)
        two += _leaf(x_tile, w_tile, 3, size, BLOCK_M, BLOCK_N, BLOCK_K)
        root += two
    if COUNT == 8:
        four = _leaf(x_tile, w_tile, 4, size, BLOCK_M, BLOCK_N, BLOCK_K)
        four += _leaf(x_tile, w_tile, 5, size, BLOCK_M, BLOCK_N, BLOCK_K)
        six = _leaf(x_tile, w_tile, 6, size, BLOCK_M, BLOCK_N, BLOCK_K)
        six += _leaf(x_tile, w_tile, 7, size, BLOCK_M, BLOCK_N, BLOCK_K)
        root += four + six
    _finish(root, bias, out, m, n, rows, cols, HAS_BIAS)


@triton.jit(do_not_specialize=["rows"])
def _each(
    x,
    w,
    parts,
    rows,
    cols,
    size,
    stride_x,
    stride_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    leaf = tl.program_id(1)
    tiles_n = tl.cdiv(cols, BLOCK_N)
    m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_tile = x + (m % rows).to(tl.int64)[:, None] * stride_x + k[None, :]
    w_tile = w + (n % cols).to(tl.int64)[None, :] * stride_w + k[:, None]
    total = _leaf(x_tile, w_tile, leaf, size, BLOCK_M, BLOCK_N, BLOCK_K)
    _finish(total, parts, parts + leaf.to(tl.int64) * rows * cols, m, n, rows, cols, False)


@triton.jit
def _part(parts, index, count, at, mask):
    return tl.load(parts + index * count.to(tl.int64) + at, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["count"])
def _tree(parts, bias, out, count, cols, COUNT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    root = _part(parts, 0, count, at, mask)
    if COUNT >= 2:
        root += _part(parts, 1, count, at, mask)
    if COUNT >= 4:
        root += _part(parts, 2, count, at, mask) + _part(parts, 3, count, at, mask)
    if COUNT == 8:
        four = _part(parts, 4, count, at, mask) + _part(parts, 5, count, at, mask)
        root += four + (_part(parts, 6, count, at, mask) + _part(parts, 7, count, at, mask))
    if HAS_BIAS:
        root += tl.load(bias + at % cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, root.to(out.dtype.element_ty), mask=mask)


def step(size: int) -> int:
    """The kernel's step of K for leaves of `size` elements. Raises ValueError if no step fits."""
    for block in (64, 32, 16):
        if size % block == 0:
            return block
    raise ValueError(f"a leaf of {size} elements of K is no multiple of 16")


def tile(rows: int, size: int, each: bool) -> gemm.Tile:
    """Block sizes for a number of rows and a leaf's size. They do not change bits where the certificate says so."""
    deep = step(size)
    if each:
        if rows <= 16:
            return gemm.Tile(16, 64, 128 if size % 128 == 0 else deep, 4, 4)
        return gemm.Tile(32 if rows <= 32 else 64, 64, deep, 4, 4)
    if rows <= 512:
        return gemm.Tile(64, 128, deep, 8, 3)
    return gemm.Tile(128, 128, deep, 8, 3)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    leaves: int,
    dtype: torch.dtype,
    each: bool | None = None,
    blocks: gemm.Tile | None = None,
) -> torch.Tensor:
    """x [M, K] @ weight [N, K].T (+ bias [N]) in `leaves` leaves -> [M, N] of `dtype`: fp32 for a subtree's root.

    each: whether each leaf has programs of its own; by default for few rows. Raises ValueError if the leaves do not
    fit.
    """
    (rows, depth), cols = x.shape, weight.shape[0]
    if leaves not in LEAVES or depth % leaves:
        raise ValueError(f"K = {depth} cannot be cut into {leaves} leaves")
    size = depth // leaves
    each = rows <= FEW if each is None else each
    chosen = blocks or tile(rows, size, each)
    out = torch.empty((rows, cols), dtype=dtype, device=x.device)
    if not rows:
        return out
    launch = {"BLOCK_M": chosen.m, "BLOCK_N": chosen.n, "BLOCK_K": chosen.k}
    launch |= {"num_warps": chosen.warps, "num_stages": chosen.stages}
    if each:
        parts = torch.empty((leaves, rows, cols), dtype=torch.float32, device=x.device)
        grid = (gemm.count(chosen, rows, cols), leaves)
        _each[grid](x, weight, parts, rows, cols, size, x.stride(0), weight.stride(0), **launch)
        return tree(parts, bias, dtype)
    _whole[(gemm.count(chosen, rows, cols),)](
        x,
        weight,
        bias if bias is not None else x,
        out,
        rows,
        cols,
        size,
        x.stride(0),
        weight.stride(0),
        COUNT=leaves,
        HAS_BIAS=bias is not None,
        GROUP=8,
        **launch,
    )
    return out


def tree(parts: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The sum of fp32 parts [L, M, N] in the tree, plus bias [N] -> [M, N] of `dtype`."""
    count = parts[0].numel()
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    if count:
        grid = (triton.cdiv(count, 1024),)
        _tree[grid](
            parts,
            bias if bias is not None else parts,
            out,
            count,
            parts.shape[2],
            COUNT=parts.shape[0],
            HAS_BIAS=bias is not None,
            BLOCK=1024,
            num_warps=4,
        )
    return out
