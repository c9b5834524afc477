"""Gradients of RMSNorm: out[r] = x[r] * s[r] * (weight + offset), with s[r] = rsqrt(mean(x[r]^2) + eps); rows [R, C].

dx[r] = round(s[r] * (g[r] * w - n[r] * mean(g[r] * w * n[r]))), with n = x * s and w = weight + offset, in fp32.
dweight = sum over r of g[r] * n[r], in fp32.

Order: one program sums a row, in one tile that depends on C alone. For dweight, lane i of a program's ROWS lanes adds
rows i, i + ROWS, ... of the program's ROWS * _STEPS rows, ascending; then the lanes are summed. A second kernel adds
the programs' sums, in _TOGETHER lanes. So dx depends on its row alone, and dweight on the number and place of the rows.
C is at most 16384.
"""

import torch
import triton
import triton.language as tl

_WIDEST = 16384
_STEPS = tl.constexpr(32)
_TOGETHER = tl.constexpr(32)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(x, g, weight, dx, parts, rows, cols, eps, offset, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    c = tl.arange(0, BLOCK)
    inside = c < cols
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32) + offset
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for step in range(_STEPS):
        r = (tl.program_id(0).to(tl.int64) * _STEPS + step) * ROWS + tl.arange(0, ROWS)
        at = r[:, None] * cols + c[None, :]
        mask = (r < rows)[:, None] & inside[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, axis=1) / cols + eps)[:, None]
        normed = value * scale
        scaled = grad * w[None, :]
        mean = (tl.sum(scaled * normed, axis=1) / cols)[:, None]
        tl.store(dx + at, (scale * (scaled - normed * mean)).to(dx.dtype.element_ty), mask=mask)
        total += grad * normed
    tl.store(parts + tl.program_id(0) * cols + c, tl.sum(total, axis=0), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _column_sum(parts, out, rows, cols, BLOCK: tl.constexpr):
    """out [cols] = the sum of parts [rows, cols] over rows."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((_TOGETHER, BLOCK), dtype=tl.float32)
    for first in range(0, rows, _TOGETHER):
        r = first + tl.arange(0, _TOGETHER)
        mask = (r < rows)[:, None] & (c < cols)[None, :]
        total += tl.load(parts + r[:, None] * cols + c[None, :], mask=mask, other=0.0)
    tl.store(out + c, tl.sum(total, axis=0), mask=c < cols)


def rms_norm(
    x: torch.Tensor, g: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx [R, C] in x's dtype, dweight [C] fp32) from x and g [R, C] (bf16, fp16 or fp32) and weight [C] of any float.

    Raises ValueError for rows of more than 16384 elements.
    """
    rows, cols = x.shape
    if cols > _WIDEST:
        raise ValueError(f"norm_backward: rows of {cols} elements, more than {_WIDEST}")
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.zeros(cols, dtype=torch.float32, device=x.device)
    if rows == 0:
        return dx, out
    x, g = _aligned(x), _aligned(g)
    block = max(16, triton.next_power_of_2(cols))
    together = max(1, 2048 // block)
    programs = triton.cdiv(rows, together * _STEPS.value)
    parts = torch.empty((programs, cols), dtype=torch.float32, device=x.device)
    warps = max(1, min(16, block * together // 512))
    _rms_norm[(programs,)](x, g, weight, dx, parts, rows, cols, eps, offset, block, together, num_warps=warps)
    _column_sum[(triton.cdiv(cols, 64),)](parts, out, programs, cols, 64, num_warps=4)
    return dx, out


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, contiguous and aligned: Triton would compile other loads, and other sums, for another x."""
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
