"""Gradients of a gated activation: out = act(gate) * up, element by element, in bf16, fp16 or fp32.

dgate = round(g * up * act'(gate)), dup = round(g * act(gate)), in fp32. act: silu, gelu by tanh, or gelu by erf.
There is no sum, so there is no order.
"""

import torch
import triton
import triton.language as tl

KINDS = ("silu", "gelu_tanh", "gelu")
_BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def _gated(g, gate, up, dgate, dup, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    grad = tl.load(g + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    if KIND == 0:
        share = 1.0 / (1.0 + tl.exp(-x))
        value = x * share
        slope = share * (1.0 + x * (1.0 - share))
    elif KIND == 1:
        # tanh(y) = 1 - 2 / (exp(2y) + 1), of y = sqrt(2 / pi) * (x + 0.044715 * x^3)
        tanh = 1.0 - 2.0 / (tl.exp(1.5957691216057308 * (x + 0.044715 * x * x * x)) + 1.0)
        value = 0.5 * x * (1.0 + tanh)
        inner = 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        slope = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner
    else:
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * share
        slope = share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    tl.store(dgate + at, (grad * u * slope).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + at, (grad * value).to(dup.dtype.element_ty), mask=mask)


def gated(g: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate, dup) from g, gate and up of one shape and dtype. kind: one of KINDS."""
    g, gate, up = (x.contiguous() for x in (g, gate, up))
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    count = gate.numel()
    if count:
        _gated[(triton.cdiv(count, _BLOCK),)](g, gate, up, dgate, dup, count, KINDS.index(kind), _BLOCK, num_warps=4)
    return dgate, dup
