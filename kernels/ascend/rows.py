"""Row operations over the last dimension: RMSNorm, softmax, log_softmax, sum, mean, cumsum, and a weighted sum of rows.

x [..., C] in bf16, fp16 or fp32; computed in fp32. RMSNorm rounds once, at the end; with a residual, round(x +
residual) replaces x.

Order of a sum over C columns: lane i of BLOCK adds columns i, i + BLOCK, ... in ascending order, in fp32; then the
compiler sums the vector of BLOCK lanes. BLOCK is chips.row_block(C), so the order depends on C alone. cumsum scans
each block and adds blocks in ascending order. The weighted sum adds its rows in ascending k. A program computes whole
rows, one after another.
"""

import torch
import triton
import triton.language as tl

from .chips import Chip, row_block
from .scalars import wide


@triton.jit
def _rms_norm(
    x,
    residual,
    weight,
    out,
    summed,
    rows,
    cols,
    stride_row,
    eps,
    offset,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for r in range(tl.program_id(0), rows, PROGRAMS):
        row = wide(r)
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, cols, BLOCK):
            c = start + tl.arange(0, BLOCK)
            values = tl.load(x + row * stride_row + c, mask=c < cols, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                values += tl.load(residual + row * cols + c, mask=c < cols, other=0.0).to(tl.float32)
                rounded = values.to(summed.dtype.element_ty)
                tl.store(summed + row * cols + c, rounded, mask=c < cols)
                values = rounded.to(tl.float32)
            squares += values * values
        scale = tl.rsqrt(tl.sum(squares, axis=0) / cols + eps)
        for start in range(0, cols, BLOCK):
            c = start + tl.arange(0, BLOCK)
            if HAS_RESIDUAL:
                again = tl.load(x + row * stride_row + c, mask=c < cols, other=0.0).to(tl.float32)
                again += tl.load(residual + row * cols + c, mask=c < cols, other=0.0).to(tl.float32)
                again = again.to(summed.dtype.element_ty).to(tl.float32)
            else:
                again = tl.load(x + row * stride_row + c, mask=c < cols, other=0.0).to(tl.float32)
            again = again * scale
            if HAS_WEIGHT:
                again = again * (tl.load(weight + c, mask=c < cols, other=0.0).to(tl.float32) + offset)
            tl.store(out + row * cols + c, again.to(out.dtype.element_ty), mask=c < cols)


@triton.jit
def _softmax(x, out, rows, cols, stride_row, IS_LOG: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    for r in range(tl.program_id(0), rows, PROGRAMS):
        row = wide(r)
        most = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
        for start in range(0, cols, BLOCK):
            c = start + tl.arange(0, BLOCK)
            v = tl.load(x + row * stride_row + c, mask=c < cols, other=-float("inf")).to(tl.float32)
            most = tl.maximum(most, v)
        top = tl.max(most, axis=0)
        lanes = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, cols, BLOCK):
            c = start + tl.arange(0, BLOCK)
            v = tl.load(x + row * stride_row + c, mask=c < cols, other=-float("inf")).to(tl.float32)
            lanes += tl.exp(v - top)
        total = tl.sum(lanes, axis=0)
        for start in range(0, cols, BLOCK):
            c = start + tl.arange(0, BLOCK)
            v = tl.load(x + row * stride_row + c, mask=c < cols, other=-float("inf")).to(tl.float32)
            if IS_LOG:
                v = (v - top) - tl.log(total)
            else:
                v = tl.exp(v - top) / total
            tl.store(out + row * cols + c, v.to(out.dtype.element_ty), mask=c < cols)


@triton.jit
def _total(x, out, rows, cols, stride_row, IS_MEAN: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    for r in range(tl.program_id(0), rows, PROGRAMS):
        row = wide(r)
        lanes = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, cols, BLOCK):
            c = start + tl.arange(0, BLOCK)
            lanes += tl.load(x + row * stride_row + c, mask=c < cols, other=0.0).to(tl.float32)
        total = tl.sum(lanes, axis=0)
        if IS_MEAN:
            total = total / cols
        tl.store(out + row, total.to(out.dtype.element_ty))


@triton.jit
def _cumsum(x, out, rows, cols, stride_row, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    for r in range(tl.program_id(0), rows, PROGRAMS):
        row = wide(r)
        before = 0.0
        for start in range(0, cols, BLOCK):
            c = start + tl.arange(0, BLOCK)
            v = tl.load(x + row * stride_row + c, mask=c < cols, other=0.0).to(tl.float32)
            tl.store(out + row * cols + c, (before + tl.cumsum(v, axis=0)).to(out.dtype.element_ty), mask=c < cols)
            before += tl.sum(v, axis=0)


@triton.jit
def _weighted(
    x,
    at,
    probs,
    out,
    rows,
    cols,
    top_k,
    stride_row,
    HAS_PROBS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for r in range(tl.program_id(0), rows, PROGRAMS):
        row = wide(r)
        for start in range(0, cols, BLOCK):
            c = start + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            for k in range(0, top_k):
                source = tl.load(at + row * top_k + k).to(tl.int64)
                v = tl.load(x + source * stride_row + c, mask=c < cols, other=0.0).to(tl.float32)
                if HAS_PROBS:
                    v = v * tl.load(probs + row * top_k + k).to(tl.float32)
                total += v
            tl.store(out + row * cols + c, total.to(out.dtype.element_ty), mask=c < cols)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, columns] with contiguous columns; copies x only if no view exists."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    return x.contiguous().view(-1, x.shape[-1])


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    chip: Chip,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """RMSNorm over the last dimension of x [..., C] (bf16, fp16, fp32), times (weight [C] + offset).

    residual: x's shape. Returns (out, x + residual), both contiguous; the second is None without a residual.
    """
    flat = _flat(x)
    rows, cols = flat.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = None
    if residual is not None:
        residual = residual.contiguous()
        summed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        programs = min(chip.vector_cores, rows)
        _rms_norm[(programs,)](
            flat,
            residual if residual is not None else flat,
            weight if weight is not None else flat,
            out,
            summed if summed is not None else flat,
            rows,
            cols,
            flat.stride(0),
            float(eps),
            float(offset),
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            PROGRAMS=programs,
            BLOCK=row_block(cols),
        )
    return out, summed


def softmax(x: torch.Tensor, chip: Chip, dtype: torch.dtype | None = None, log: bool = False) -> torch.Tensor:
    """softmax, or log_softmax if `log`, over the last dimension of x [..., C]; rounded to dtype (default: x's)."""
    flat = _flat(x)
    rows, cols = flat.shape
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    if out.numel():
        programs = min(chip.vector_cores, rows)
        _softmax[(programs,)](
            flat, out, rows, cols, flat.stride(0), IS_LOG=log, PROGRAMS=programs, BLOCK=row_block(cols)
        )
    return out


def total(x: torch.Tensor, chip: Chip, dtype: torch.dtype | None = None, mean: bool = False) -> torch.Tensor:
    """Sum, or mean, over the last dimension of x [..., C], C >= 1 -> [...]; rounded to dtype (default: x's)."""
    flat = _flat(x)
    rows, cols = flat.shape
    out = torch.empty(x.shape[:-1], dtype=dtype or x.dtype, device=x.device)
    if out.numel():
        programs = min(chip.vector_cores, rows)
        _total[(programs,)](
            flat, out, rows, cols, flat.stride(0), IS_MEAN=mean, PROGRAMS=programs, BLOCK=row_block(cols)
        )
    return out


def cumsum(x: torch.Tensor, chip: Chip, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Running sum over the last dimension of x [..., C], in fp32; rounded to dtype (default: x's)."""
    flat = _flat(x)
    rows, cols = flat.shape
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    if out.numel():
        programs = min(chip.vector_cores, rows)
        _cumsum[(programs,)](flat, out, rows, cols, flat.stride(0), PROGRAMS=programs, BLOCK=row_block(cols))
    return out


def weighted(x: torch.Tensor, at: torch.Tensor, probs: torch.Tensor | None, top_k: int, chip: Chip) -> torch.Tensor:
    """out[t] = sum over ascending k of x[at[t * top_k + k]] * probs[t, k], for x [R, C] -> [T, C].

    Computed in fp32, rounded once. at: [T * top_k] integers. probs: [T, top_k], or None for weights of 1.
    """
    flat = _flat(x)
    cols = flat.shape[1]
    rows = at.numel() // top_k
    out = torch.empty((rows, cols), dtype=x.dtype, device=x.device)
    if out.numel():
        programs = min(chip.vector_cores, rows)
        held = probs.contiguous() if probs is not None else flat
        _weighted[(programs,)](
            flat,
            at.contiguous(),
            held,
            out,
            rows,
            cols,
            top_k,
            flat.stride(0),
            HAS_PROBS=probs is not None,
            PROGRAMS=programs,
            BLOCK=row_block(cols),
        )
    return out
