"""SwiGLU and the rotary embedding, in bf16, fp16 or fp32. Both compute in fp32 and round once.

swiglu: x [..., 2 * H] = [a | b] -> round(silu(a) * b) [..., H].
rotate (neox style): the halves (a, b) of a head's first 2 * half elements become (a * cos - b * sin, b * cos + a *
sin); the remaining elements are copied.

There are no sums, and one kernel serves every number of tokens.
"""

import torch
import triton
import triton.language as tl

from .chips import Chip, row_block
from .scalars import wide


@triton.jit
def _swiglu(x, out, rows, half, stride_row, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    for r in range(tl.program_id(0), rows, PROGRAMS):
        row = wide(r)
        for start in range(0, half, BLOCK):
            c = start + tl.arange(0, BLOCK)
            a = tl.load(x + row * stride_row + c, mask=c < half, other=0.0).to(tl.float32)
            b = tl.load(x + row * stride_row + half + c, mask=c < half, other=0.0).to(tl.float32)
            value = a / (1.0 + tl.exp(-a)) * b
            tl.store(out + row * half + c, value.to(out.dtype.element_ty), mask=c < half)


@triton.jit
def _rotate(
    positions,
    x,
    cache,
    out,
    rows,
    heads,
    head_size,
    half,
    stride_row,
    stride_cache,
    PROGRAMS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HAS_REST: tl.constexpr,
):
    c = tl.arange(0, HALF)
    for r in range(tl.program_id(0), rows, PROGRAMS):
        token = wide(r // heads)
        source = x + token * stride_row + (r % heads) * head_size
        target = out + wide(r) * head_size
        line = cache + tl.load(positions + token).to(tl.int64) * stride_cache
        cos = tl.load(line + c, mask=c < half, other=0.0).to(tl.float32)
        sin = tl.load(line + half + c, mask=c < half, other=0.0).to(tl.float32)
        a = tl.load(source + c, mask=c < half, other=0.0).to(tl.float32)
        b = tl.load(source + half + c, mask=c < half, other=0.0).to(tl.float32)
        tl.store(target + c, (a * cos - b * sin).to(out.dtype.element_ty), mask=c < half)
        tl.store(target + half + c, (b * cos + a * sin).to(out.dtype.element_ty), mask=c < half)
        if HAS_REST:
            d = 2 * half + tl.arange(0, REST)
            tl.store(target + d, tl.load(source + d, mask=d < head_size, other=0.0), mask=d < head_size)


def swiglu(x: torch.Tensor, chip: Chip) -> torch.Tensor:
    """x [..., 2 * H] (bf16, fp16, fp32) -> [..., H]."""
    half = x.shape[-1] // 2
    flat = x if x.dim() == 2 and x.stride(1) == 1 else x.contiguous().view(-1, x.shape[-1])
    out = torch.empty((*x.shape[:-1], half), dtype=x.dtype, device=x.device)
    if out.numel():
        programs = min(chip.vector_cores, flat.shape[0])
        _swiglu[(programs,)](flat, out, flat.shape[0], half, flat.stride(0), PROGRAMS=programs, BLOCK=row_block(half))
    return out


def rotate(positions: torch.Tensor, x: torch.Tensor, cache: torch.Tensor, head_size: int, chip: Chip) -> torch.Tensor:
    """Rotate x [T, heads * head_size] by cache [P, rotary] (cosines, then sines) at positions [T].

    rotary may be less than head_size. Rows of x may be strided. Returns a new contiguous tensor of x's shape.
    """
    tokens, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    half = cache.shape[-1] // 2
    out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
    rows = tokens * (width // head_size)
    if rows:
        programs = min(chip.vector_cores, rows)
        rest = head_size - 2 * half
        _rotate[(programs,)](
            positions,
            x,
            cache,
            out,
            rows,
            width // head_size,
            head_size,
            half,
            x.stride(0),
            cache.stride(0),
            PROGRAMS=programs,
            HALF=triton.next_power_of_2(half),
            REST=triton.next_power_of_2(max(1, rest)),
            HAS_REST=rest > 0,
        )
    return out
