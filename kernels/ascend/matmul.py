"""Matrix products, batched (`matmul`) and grouped by expert (`grouped`), in bf16, fp16 or fp32.

matmul: out[b, m, n] = round(alpha * sum over k of x[b, m, k] * w[b, k, n] + beta * bias[b, m, n]).
grouped: out[m, n] = round(sum over k of x[m, k] * w[e, k, n] + bias[e, n]), where e is the expert of row m.

Order of one output: one fp32 accumulator takes K in ascending order in one pass; the bias is added in fp32; the result
is rounded once. BLOCK_K depends on the element size alone. BLOCK_M may depend on M, because no tile splits K and the
rows of a tile share no sum.

Each program loops over tiles, because a launch holds at most 65535 programs. Follows Triton's tutorial 03
(github.com/triton-lang/triton).
"""

import torch
import triton
import triton.language as tl

from .chips import Chip, Tile, matmul_tile
from .scalars import wide

_KINDS = {"none": 0, "row": 1, "full": 2}


@triton.jit
def _matmul(
    x,
    w,
    bias,
    out,
    rows,
    cols,
    depth,
    tiles,
    stride_xb,
    stride_xm,
    stride_xk,
    stride_wb,
    stride_wk,
    stride_wn,
    stride_ob,
    stride_om,
    stride_bb,
    stride_bm,
    stride_bn,
    alpha,
    beta,
    BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(cols, BLOCK_N)
    each = tl.cdiv(rows, BLOCK_M) * tiles_n
    for tile in range(tl.program_id(0), tiles, PROGRAMS):
        batch = wide(tile // each)
        m = ((tile % each) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        x_at = x + batch * stride_xb
        w_at = w + batch * stride_wb
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, tl.cdiv(depth, BLOCK_K)):
            k = start * BLOCK_K + tl.arange(0, BLOCK_K)
            a = tl.load(
                x_at + m[:, None] * stride_xm + k[None, :] * stride_xk,
                mask=(m[:, None] < rows) & (k[None, :] < depth),
                other=0.0,
            )
            b = tl.load(
                w_at + k[:, None] * stride_wk + n[None, :] * stride_wn,
                mask=(k[:, None] < depth) & (n[None, :] < cols),
                other=0.0,
            )
            total = tl.dot(a, b, total, input_precision="ieee")
        if SCALED:
            total = total * alpha
        mask = (m[:, None] < rows) & (n[None, :] < cols)
        if BIAS == 1:
            added = tl.load(bias + n, mask=n < cols, other=0.0).to(tl.float32)
            if SCALED:
                added = added * beta
            total = total + added[None, :]
        if BIAS == 2:
            full = bias + batch * stride_bb + m[:, None] * stride_bm + n[None, :] * stride_bn
            more = tl.load(full, mask=mask, other=0.0).to(tl.float32)
            if SCALED:
                more = more * beta
            total = total + more
        target = out + batch * stride_ob + m[:, None] * stride_om + n[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _grouped(
    x,
    w,
    bias,
    groups,
    out,
    experts,
    cols,
    depth,
    stride_xm,
    stride_we,
    stride_wk,
    stride_wn,
    stride_om,
    stride_be,
    HAS_BIAS: tl.constexpr,
    IS_COUNTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(cols, BLOCK_N)
    first = 0
    for expert in range(0, experts):
        given = tl.load(groups + expert).to(tl.int32)
        if IS_COUNTS:
            last = first + given
        else:
            last = given
        tiles = tl.cdiv(last - first, BLOCK_M) * tiles_n
        for tile in range(tl.program_id(0), tiles, PROGRAMS):
            m = first + (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
            n = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
            w_at = w + wide(expert) * stride_we
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for start in range(0, tl.cdiv(depth, BLOCK_K)):
                k = start * BLOCK_K + tl.arange(0, BLOCK_K)
                a = tl.load(
                    x + m[:, None] * stride_xm + k[None, :],
                    mask=(m[:, None] < last) & (k[None, :] < depth),
                    other=0.0,
                )
                b = tl.load(
                    w_at + k[:, None] * stride_wk + n[None, :] * stride_wn,
                    mask=(k[:, None] < depth) & (n[None, :] < cols),
                    other=0.0,
                )
                total = tl.dot(a, b, total, input_precision="ieee")
            if HAS_BIAS:
                added = tl.load(bias + expert * stride_be + n, mask=n < cols, other=0.0).to(tl.float32)
                total = total + added[None, :]
            target = out + m[:, None] * stride_om + n[None, :]
            tl.store(target, total.to(out.dtype.element_ty), mask=(m[:, None] < last) & (n[None, :] < cols))
        first = last


def matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    chip: Chip,
    bias: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    tile: Tile | None = None,
) -> torch.Tensor:
    """alpha * (x [B, M, K] @ w [B, K, N]) + beta * bias -> [B, M, N], contiguous.

    x and w: any strides, one dtype of bf16, fp16 and fp32. bias: [N], or a shape that broadcasts to [B, M, N]. tile:
    replaces the chip's tile, for tests. Raises ValueError for other shapes or dtypes.
    """
    if x.dim() != 3 or w.dim() != 3 or x.shape[0] != w.shape[0] or x.shape[2] != w.shape[1]:
        raise ValueError(f"matmul takes [B, M, K] and [B, K, N], not {tuple(x.shape)} and {tuple(w.shape)}")
    if x.dtype != w.dtype or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"matmul takes two tensors of one of bf16, fp16, fp32, not {x.dtype} and {w.dtype}")
    batch, rows, depth = x.shape
    cols = w.shape[2]
    out = torch.empty((batch, rows, cols), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    kind, given = "none", x
    strides = (0, 0, 0)
    if bias is not None and beta != 0:
        kind = "row" if bias.dim() == 1 and bias.shape[0] == cols else "full"
        given = bias.contiguous() if kind == "row" else bias.expand(batch, rows, cols)
        strides = (0, 0, 1) if kind == "row" else given.stride()
    tile = tile or matmul_tile(chip, rows, x.element_size())
    tiles = batch * triton.cdiv(rows, tile.m) * triton.cdiv(cols, tile.n)
    programs = min(chip.cube_cores, tiles)
    _matmul[(programs,)](
        x,
        w,
        given,
        out,
        rows,
        cols,
        depth,
        tiles,
        *x.stride(),
        *w.stride(),
        out.stride(0),
        out.stride(1),
        *strides,
        float(alpha),
        float(beta),
        BIAS=_KINDS[kind],
        SCALED=alpha != 1 or beta != 1,
        PROGRAMS=programs,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
    )
    return out


def grouped(
    x: torch.Tensor,
    w: torch.Tensor,
    groups: torch.Tensor,
    is_counts: bool,
    chip: Chip,
    bias: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Multiply the rows of x [M, K], sorted by expert, with their expert's weight in w [E, K, N] -> [M, N].

    groups: [E] integers on x's device: the number of rows of each expert (is_counts), or the end of its rows. w: any
    strides. bias: [E, N] or None. tile: as for matmul. Rows after the last group are zero. Raises ValueError for other
    shapes or dtypes.
    """
    if x.dim() != 2 or w.dim() != 3 or x.shape[1] != w.shape[1] or groups.shape != w.shape[:1]:
        raise ValueError(
            f"grouped takes [M, K], [E, K, N] and [E], not {tuple(x.shape)}, {tuple(w.shape)}, {tuple(groups.shape)}"
        )
    if x.dtype != w.dtype or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"grouped takes two tensors of one of bf16, fp16, fp32, not {x.dtype} and {w.dtype}")
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, depth = x.shape
    experts, _, cols = w.shape
    out = torch.zeros((rows, cols), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile = tile or matmul_tile(chip, max(1, rows // experts), x.element_size())
    programs = min(chip.cube_cores, triton.cdiv(rows, tile.m) * triton.cdiv(cols, tile.n))
    bias = bias.contiguous() if bias is not None else None
    _grouped[(programs,)](
        x,
        w,
        bias if bias is not None else x,
        groups,
        out,
        experts,
        cols,
        depth,
        x.stride(0),
        *w.stride(),
        out.stride(0),
        cols,
        HAS_BIAS=bias is not None,
        IS_COUNTS=is_counts,
        PROGRAMS=programs,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
    )
    return out
