"""The gated norms of recurrent layers: a program has whole rows, or groups of a row.

gated_norm: y = round(x / sqrt(mean(x^2) + eps) * weight * f(gate)), f is silu or sigmoid.
gated_first_norm: the same norm of x * silu(gate). A row's size decides the program's tile, and no other row changes a
row's sum.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "g_row"])
def _gated_norm(
    X,
    GATE,
    WEIGHT,
    OUT,
    rows,
    heads,
    g_row,
    g_head,
    eps,
    SIGMOID: tl.constexpr,
    FIRST: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    mask = (r < rows) & (c < C)
    x = tl.load(X + r * C + c, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(GATE + (r // heads) * g_row + (r % heads) * g_head + c, mask=mask, other=0.0).to(tl.float32)
    f = 1.0 / (1.0 + tl.exp(-gate))
    if not SIGMOID:
        f = f * gate
    if FIRST:
        x = x * f
        weight = tl.load(WEIGHT + (r % heads) * C + c, mask=mask, other=0.0).to(tl.float32)
    else:
        weight = tl.load(WEIGHT + c, mask=c < C, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None] * weight
    if not FIRST:
        y = y * f
    tl.store(OUT + r * C + c, y.to(OUT.dtype.element_ty), mask=mask)


def gated_norm(x, gate, weight, eps, sigmoid):
    """RMSNorm of each row of x [..., C] times weight [C] times f(gate [..., C]) -> [..., C]."""
    x, dim = x.contiguous(), x.shape[-1]
    gate = gate.reshape(x.numel() // (x.shape[-2] * dim), x.shape[-2], dim) if x.dim() > 1 else gate.reshape(1, 1, dim)
    gate = gate if gate.stride(-1) == 1 else gate.contiguous()
    return _norm(x, gate, weight, eps, sigmoid, False)


def gated_first_norm(x, gate, weight, eps, groups):
    """RMSNorm of each of the groups of x [tokens, C] times silu(gate [tokens, C]), times weight [C] -> [tokens, C]."""
    tokens, dim = x.shape
    gate = gate if gate.stride(-1) == 1 else gate.contiguous()
    size = dim // groups
    gate = gate.as_strided((tokens, groups, size), (gate.stride(0), size, 1), gate.storage_offset())
    return _norm(x.contiguous().view(tokens, groups, size), gate, weight, eps, False, True).view(tokens, dim)


def _norm(x, gate, weight, eps, sigmoid, first):
    """gate [tokens, heads, C], x [..., C] dense."""
    out, dim = torch.empty_like(x), x.shape[-1]
    rows = x.numel() // dim
    block = triton.next_power_of_2(dim)
    tile = max(1, 1024 // block)
    _gated_norm[triton.cdiv(rows, tile),](
        x,
        gate,
        weight,
        out,
        rows,
        gate.shape[1],
        gate.stride(0),
        gate.stride(1),
        eps,
        sigmoid,
        first,
        dim,
        block,
        tile,
        num_warps=max(4, min(8, block // 512)),
    )
    return out
