"""Gradient of an embedding: out[t] = sum of g[r] over the rows r whose token is t, in fp32; g [R, C].

Order: one program adds the rows of one token, ascending, in one fp32 accumulator a column. No two programs add to one
number.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 512


@triton.jit
def _embedding(g, order, begins, tokens, out, cols, stride, BLOCK: tl.constexpr):
    s = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(tl.load(begins + s), tl.load(begins + s + 1)):
        total += tl.load(g + tl.load(order + at) * stride + c, mask=c < cols, other=0.0).to(tl.float32)
    tl.store(out + tl.load(tokens + s) * cols + c, total, mask=c < cols)


def embedding(g: torch.Tensor, ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """[vocabulary, C] fp32 from g [R, C] (bf16, fp16 or fp32) and ids [R] int64 below `vocabulary`."""
    cols = g.shape[1]
    out = torch.zeros((vocabulary, cols), dtype=torch.float32, device=g.device)
    if not ids.numel():
        return out
    g = g if g.stride(1) == 1 else g.contiguous()
    held, order = ids.sort(stable=True)
    tokens, counts = held.unique_consecutive(return_counts=True)
    begins = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    _embedding[(len(tokens), triton.cdiv(cols, _BLOCK))](
        g, order, begins, tokens, out, cols, g.stride(0), _BLOCK, num_warps=4
    )
    return out
