"""RMSNorm and LayerNorm of rows, in bf16, fp16 or fp32; computed in fp32, rounded once.

RMSNorm: out[r] = round(x[r] * rsqrt(mean(x[r]^2) + eps) * (weight + offset)). With a residual, round(x + residual), in
the dtype of x, replaces x and is returned too.
LayerNorm: out[r] = round((x[r] - mean(x[r])) * rsqrt(mean((x[r] - mean(x[r]))^2) + eps) * weight + bias).

Order: one program sums a row. Up to 16384 columns, a block holds the whole row. RMSNorm cuts longer rows into blocks of
16384 columns, which are added lane by lane in ascending order; then the lanes are summed. LayerNorm takes no longer
rows. The tile depends on C alone.
"""

import functools

import torch
import triton
import triton.language as tl

from .launch import Launcher, empty

_WIDEST = 16384


@triton.jit
def _rms_norm(
    x,
    residual,
    weight,
    out,
    summed,
    rows,
    heads,
    cols,
    stride_row,
    stride_head,
    eps,
    offset,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    source = ((r // heads) * stride_row + (r % heads) * stride_head)[:, None]
    target = (r * cols)[:, None]
    squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    values = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for chunk in tl.static_range(CHUNKS):
        at = chunk * BLOCK + c[None, :]
        mask = (r[:, None] < rows) & (at < cols)
        loaded = tl.load(x + source + at, mask=mask, other=0.0)
        values = loaded.to(tl.float32)
        if HAS_RESIDUAL:
            values += tl.load(residual + target + at, mask=mask, other=0.0).to(tl.float32)
            rounded = values.to(loaded.dtype)
            tl.store(summed + target + at, rounded, mask=mask)
            values = rounded.to(tl.float32)
        squares += values * values
    scale = tl.rsqrt(tl.sum(squares, axis=1) / cols + eps)[:, None]
    for chunk in tl.static_range(CHUNKS):
        at = chunk * BLOCK + c[None, :]
        mask = (r[:, None] < rows) & (at < cols)
        if CHUNKS > 1:
            if HAS_RESIDUAL:
                values = tl.load(summed + target + at, mask=mask, other=0.0).to(tl.float32)
            else:
                values = tl.load(x + source + at, mask=mask, other=0.0).to(tl.float32)
        normed = values * scale
        if HAS_WEIGHT:
            normed = normed * (tl.load(weight + at, mask=at < cols, other=0.0).to(tl.float32) + offset)
        tl.store(out + target + at, normed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _layer_norm(
    x,
    weight,
    bias,
    out,
    rows,
    cols,
    stride_row,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)[None, :]
    mask = (r[:, None] < rows) & (c < cols)
    values = tl.load(x + (r * stride_row)[:, None] + c, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, values - (tl.sum(values, axis=1) / cols)[:, None], 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=1) / cols + eps)[:, None]
    if HAS_WEIGHT:
        normed = normed * tl.load(weight + c, mask=c < cols, other=0.0).to(tl.float32)
    if HAS_BIAS:
        normed = normed + tl.load(bias + c, mask=c < cols, other=0.0).to(tl.float32)
    tl.store(out + (r * cols)[:, None] + c, normed.to(out.dtype.element_ty), mask=mask)


_launch_rms_norm, _launch_layer_norm = Launcher(_rms_norm), Launcher(_layer_norm)


@functools.cache
def shape_of(cols: int) -> tuple[int, int, int, int]:
    """(block, rows per program, blocks per row, warps) for rows of `cols` elements."""
    block = min(triton.next_power_of_2(cols), _WIDEST)
    rows = max(1, 1024 // block)
    return block, rows, triton.cdiv(cols, block), max(1, min(16, block * rows // 512))


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """RMSNorm over the last dimension of x [..., C] (bf16, fp16, fp32). residual: x's shape. weight: [C].

    Returns (out, x + residual), both contiguous; the second is None without a residual.
    """
    cols = x.shape[-1]
    if x.dim() not in (2, 3) or x.stride(-1) != 1:
        x = x.contiguous()
    out = empty(x, x.shape)
    summed = None if residual is None else empty(x, x.shape)
    if x.dim() == 2:
        heads, stride_head, rows, stride_row = 1, 0, x.shape[0] if cols else 0, x.stride(0)
    elif x.dim() == 3:
        heads, rows = x.shape[1], x.shape[0] * x.shape[1] if cols else 0
        stride_row, stride_head, _ = x.stride()
    else:
        heads, stride_head, rows, stride_row = 1, 0, x.numel() // cols if cols else 0, cols
    if rows == 0:
        return out, summed
    block, per_program, chunks, warps = shape_of(cols)
    _launch_rms_norm(
        (-(-rows // per_program), 1),
        (
            x,
            x if residual is None else residual.contiguous(),
            x if weight is None else weight,
            out,
            out if summed is None else summed,
        ),
        rows,
        (heads, cols, stride_row, stride_head, float(eps), float(offset)),
        (residual is not None, weight is not None, block, per_program, chunks),
        warps,
    )
    return out, summed


def covers_layer_norm(cols: int) -> bool:
    """Whether `layer_norm` takes rows of `cols` elements."""
    return 0 < cols <= _WIDEST


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """LayerNorm over the last dimension of x [..., C] (bf16, fp16, fp32) -> the same shape and dtype, contiguous.

    weight, bias: [C] or None. C is at most 16384 (`covers_layer_norm`).
    """
    cols = x.shape[-1]
    flat = x if x.dim() == 2 and x.stride(-1) == 1 else x.reshape(-1, cols).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = flat.shape[0]
    if rows == 0:
        return out
    block, per_program, _, warps = shape_of(cols)
    _launch_layer_norm(
        (-(-rows // per_program), 1),
        (flat, flat if weight is None else weight, flat if bias is None else bias, out),
        rows,
        (cols, flat.stride(0), float(eps)),
        (weight is not None, bias is not None, block, per_program),
        warps,
    )
    return out
