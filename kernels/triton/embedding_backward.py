"""Gradient of an embedding: out[t] = sum of g[r] over the rows r whose token is t, in fp32; g [R, C].

Order: one program adds the rows of one token, ascending, in one fp32 accumulator a column, which begins at 0 or at the
number that is there. No two programs add to one number. So one call that adds to a buffer gives the bits of several
calls for parts of the rows, ascending.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 512


@triton.jit
def _embedding(g, order, begins, tokens, out, cols, stride, BLOCK: tl.constexpr, ADD: tl.constexpr):
    s = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    to = out + tl.load(tokens + s) * cols + c
    total = tl.load(to, mask=c < cols, other=0.0) if ADD else tl.zeros((BLOCK,), tl.float32)
    for at in range(tl.load(begins + s), tl.load(begins + s + 1)):
        total += tl.load(g + tl.load(order + at) * stride + c, mask=c < cols, other=0.0).to(tl.float32)
    tl.store(to, total, mask=c < cols)


def embedding(g: torch.Tensor, ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """[vocabulary, C] fp32 from g [R, C] (bf16, fp16 or fp32) and ids [R] int64 below `vocabulary`."""
    out = torch.zeros((vocabulary, g.shape[1]), dtype=torch.float32, device=g.device)
    return _run(g, ids, out, False)


def add(g: torch.Tensor, ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Add to out [vocabulary, C] fp32, contiguous, in place, row after row. g, ids: as for `embedding`."""
    return _run(g, ids, out, True)


def _run(g: torch.Tensor, ids: torch.Tensor, out: torch.Tensor, to_what_is_there: bool) -> torch.Tensor:
    if not ids.numel():
        return out
    cols = g.shape[1]
    g = g if g.stride(1) == 1 else g.contiguous()
    held, order = ids.sort(stable=True)
    tokens, counts = held.unique_consecutive(return_counts=True)
    begins = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    _embedding[(len(tokens), triton.cdiv(cols, _BLOCK))](
        g, order, begins, tokens, out, cols, g.stride(0), _BLOCK, to_what_is_there, num_warps=4
    )
    return out
