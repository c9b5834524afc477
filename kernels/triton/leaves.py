"""GEMM of a rank's part of a row-parallel layer, in fixed parts of K: the same bits for every number of ranks.

x [M, K], w [N, K] (bf16 or fp16), bias [N] or none. K is cut into `leaves` equal parts, a power of two up to 8. Each is
a multiple of a kernel's step of K, and has two steps or more: Triton would join the product of a single step with the
addition of another leaf, and that sum would have another order.

Order of one output: one fp32 accumulator takes a leaf's K in ascending order in one pass. Leaves are added in fp32 in a
binary tree: ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)). A rank of n computes 8 / n neighboring leaves, a whole subtree,
whose root stays in fp32. The roots of all ranks are added in the same tree, then the bias; the result is rounded once.

`_flat`: one loop over all leaves of a tile, so that loads never stop between leaves. Sums are added as a binary counter
carries. For few rows, two programs share a tile's leaves, and `_tree` adds their roots. `_pairs`: for large tiles, a
loop over two leaves at a time; roots wait in memory, because registers have no room for them.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import gemm

LEAVES = (1, 2, 4, 8)
SHARED = 200 << 10  # bytes of shared memory of a block that the tiles with tensor descriptors need


class Form(NamedTuple):
    """A kernel and its tile. The form does not change bits where the certificate says so.

    groups: programs that share a tile's leaves; 0 selects `_pairs`. described: whether tensor descriptors load.
    """

    groups: int
    described: bool
    tile: gemm.Tile


@triton.jit
def _finish(total, bias, out, m, n, rows, cols, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < cols, other=0.0).to(tl.float32)[None, :]
    target = out + m.to(tl.int64)[:, None] * cols + n[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < cols))


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
    DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """STEPS: steps of K in a leaf. COUNT: leaves of one program."""
    tile_m, tile_n = gemm._swizzle(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N), GROUP)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    out += tl.program_id(1).to(tl.int64) * rows * cols
    first = tl.program_id(1) * STEPS * COUNT
    if not DESCRIBED:
        k = first * BLOCK_K + tl.arange(0, BLOCK_K)
        x_tile = x + m.to(tl.int64)[:, None] * stride_x + k[None, :]
        w_tile = w + (n % cols).to(tl.int64)[None, :] * stride_w + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    one = total
    two = total
    four = total
    for i in range(STEPS * COUNT):
        if DESCRIBED:
            a = x.load([tile_m * BLOCK_M, (first + i) * BLOCK_K])
            b = w.load([tile_n * BLOCK_N, (first + i) * BLOCK_K]).T
        else:
            a = tl.load(x_tile, mask=m[:, None] < rows, other=0.0)
            b = tl.load(w_tile)
            x_tile += BLOCK_K
            w_tile += BLOCK_K
        total = tl.dot(a, b, total, input_precision="ieee")
        if COUNT > 1 and i % STEPS == STEPS - 1:
            leaf = i // STEPS
            if leaf % 2 == 0:
                one = total
            else:
                one += total
                if COUNT >= 4:
                    if leaf % 4 == 1:
                        two = one
                    else:
                        two += one
                        if COUNT == 8:
                            if leaf == 3:
                                four = two
                            else:
                                four += two
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    root = total
    if COUNT == 2:
        root = one
    if COUNT == 4:
        root = two
    if COUNT == 8:
        root = four
    _finish(root, bias, out, m, n, rows, cols, HAS_BIAS)


@triton.jit
def _pair(x, w, m, n, leaf, STEPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    one = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    two = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(leaf * STEPS, (leaf + 1) * STEPS):
        k = i * BLOCK_K
        one = tl.dot(x.load([m, k]), w.load([n, k]).T, one, input_precision="ieee")
        k = (i + STEPS) * BLOCK_K
        two = tl.dot(x.load([m, k]), w.load([n, k]).T, two, input_precision="ieee")
    return one + two


@triton.jit(do_not_specialize=["rows"])
def _pairs(
    x,
    w,
    bias,
    held,
    out,
    rows,
    cols,
    STEPS: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """COUNT: 2, 4 or 8 leaves. held: fp32 [programs, 2, BLOCK_M, BLOCK_N]. A thread may load what another thread
    stored, hence the barriers."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(cols, BLOCK_N)
    own = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    held += tl.program_id(0) * 2 * BLOCK_M * BLOCK_N
    other = held + BLOCK_M * BLOCK_N
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = gemm._swizzle(tile, tiles_m, tiles_n, GROUP)
        m = tile_m * BLOCK_M
        n = tile_n * BLOCK_N
        root = _pair(x, w, m, n, 0, STEPS, BLOCK_M, BLOCK_N, BLOCK_K)
        if COUNT >= 4:
            tl.store(held + own, root)
            root = _pair(x, w, m, n, 2, STEPS, BLOCK_M, BLOCK_N, BLOCK_K)
            tl.debug_barrier()
            root += tl.load(held + own)
        if COUNT == 8:
            tl.store(other + own, root)
            root = _pair(x, w, m, n, 4, STEPS, BLOCK_M, BLOCK_N, BLOCK_K)
            tl.debug_barrier()
            tl.store(held + own, root)
            root = _pair(x, w, m, n, 6, STEPS, BLOCK_M, BLOCK_N, BLOCK_K)
            tl.debug_barrier()
            root += tl.load(held + own)
            root += tl.load(other + own)
        _finish(root, bias, out, m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N), rows, cols, HAS_BIAS)
        tl.debug_barrier()


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


def step(size: int, most: int = 64) -> int:
    """The kernel's step of K for leaves of `size` elements, up to `most`; a leaf has two steps or more. Raises
    ValueError if no step fits."""
    for block in (128, 64, 32, 16):
        if block <= most and size % block == 0 and size > block:
            return block
    raise ValueError(f"a leaf of {size} elements of K is no multiple of 16 above 16")


@functools.cache
def _processors(device: torch.device) -> int:
    """The multiprocessors of a GPU that `describes` tiles; 0 for other devices."""
    if device.type != "cuda":
        return 0
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count if describes(found.major, found.shared_memory_per_block_optin) else 0


def describes(major: int, shared: int) -> bool:
    """Whether a GPU has tensor descriptors and room for their tiles. major: of its compute capability. shared: bytes of
    shared memory that a block may use."""
    return major >= 9 and shared >= SHARED


def form(rows: int, cols: int, size: int, leaves: int, processors: int) -> Form:
    """The form for x [rows, K] and w [cols, K], with K in `leaves` leaves of `size` elements; timed on an H200.

    processors: multiprocessors of a GPU that `describes` tiles; 0 for other devices. Raises ValueError if no step of K
    fits.
    """
    deep = step(size, 128)
    if rows <= 16:
        return Form(min(2, leaves), False, gemm.Tile(16, 64, deep, 4, 5))
    if rows <= 32 or not processors:
        return Form(1, False, gemm.Tile(32, 32, deep, 4, 5))
    if rows <= 128:
        return Form(1, True, gemm.Tile(64, 32, deep, 4, 6 if rows <= 64 else 4))
    large = gemm.Tile(128, 128, step(size), 8, 3)
    if leaves == 1:
        return Form(1, True, large)
    if gemm.count(large, rows, cols) > processors // 2:
        return Form(0, True, large)
    return Form(0, True, gemm.Tile(128, 64, step(size), 8, 4))


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    leaves: int,
    dtype: torch.dtype,
    chosen: Form | None = None,
) -> torch.Tensor:
    """x [M, K] @ weight [N, K].T (+ bias [N]) in `leaves` leaves -> [M, N] of `dtype`: fp32 for a subtree's root.

    The last dimension of x and weight must be contiguous, and on GPUs with tensor descriptors x and weight must fit
    these (gemm.can_describe). chosen: a form other than that of `form`. Raises ValueError if the leaves do not fit, or
    have a single step of K.
    """
    (rows, depth), cols = x.shape, weight.shape[0]
    if leaves not in LEAVES or depth % leaves:
        raise ValueError(f"K = {depth} cannot be cut into {leaves} leaves")
    processors = _processors(x.device)
    chosen = chosen or form(rows, cols, depth // leaves, leaves, processors)
    groups, tile = chosen.groups, chosen.tile
    split = max(groups, 1)
    steps, rest = divmod(depth // leaves, tile.k)
    if steps < 2 or rest or (not groups and leaves == 1):
        raise ValueError(f"{chosen} does not fit {leaves} leaves of {depth // leaves} elements of K")
    out = torch.empty((split, rows, cols), dtype=dtype if split == 1 else torch.float32, device=x.device)
    if not rows or not cols:
        return out[0].to(dtype)
    launch = {"STEPS": steps, "COUNT": leaves // split, "GROUP": 8}
    launch |= {"HAS_BIAS": bias is not None and split == 1}
    launch |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    launch |= {"num_warps": tile.warps, "num_stages": tile.stages}
    given = (x, weight)
    if chosen.described:
        from triton.tools.tensor_descriptor import TensorDescriptor

        sizes = ([tile.m, tile.k], [tile.n, tile.k])
        given = tuple(TensorDescriptor.from_tensor(*pair) for pair in zip(given, sizes, strict=True))
    added = bias if bias is not None else x
    tiles = gemm.count(tile, rows, cols)
    if groups:
        strides = x.stride(0), weight.stride(0)
        _flat[(tiles, groups)](*given, added, out, rows, cols, *strides, DESCRIBED=chosen.described, **launch)
        return out[0] if groups == 1 else tree(out, bias, dtype)
    programs = min(tiles, processors)
    held = torch.empty((programs, 2, tile.m, tile.n), dtype=torch.float32, device=x.device)
    _pairs[(programs,)](*given, added, held, out, rows, cols, **launch)
    return out[0]


def tree(parts: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The sum of fp32 parts [L, M, N] in the tree, plus bias [N] -> [M, N] of `dtype`. L: 1, 2, 4 or 8. All
    contiguous."""
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
