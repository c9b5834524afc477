"""Gradient of a token's logprob with respect to the logits: rows [R, V].

scores[r] are the logits as the sampler transformed them: capped, divided by the temperature, masked by minus infinity.
dlogits[r, v] = round(g[r] * ((v == token[r]) - softmax(scores[r])[v]) / temperature[r] * (1 - (logits[r, v] / cap)^2)),
in fp32; the last factor only with a soft cap. A masked logit gets zero.

Order: one program reads a row. Lane i of BLOCK adds columns i, i + BLOCK, ..., ascending, rescaled whenever its maximum
grows; then the lanes are rescaled to the row's maximum and summed. BLOCK is fixed, so a row's bits depend on the row.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def _logits(
    g,
    scores,
    logits,
    tokens,
    temperature,
    out,
    cols,
    stride_scores,
    stride_logits,
    cap,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, cols, BLOCK):
        mask = first + c < cols
        x = tl.load(scores + r * stride_scores + first + c, mask=mask, other=float("-inf")).to(tl.float32)
        peak = tl.maximum(most, x)
        shift = tl.where(peak > float("-inf"), peak, 0.0)
        total = total * tl.exp(most - shift) + tl.exp(x - shift)
        most = peak
    peak = tl.max(most)
    inverse = 1.0 / tl.sum(total * tl.exp(most - peak))
    token = tl.load(tokens + r)
    heat = tl.load(temperature + r)
    grad = tl.load(g + r)
    for first in range(0, cols, BLOCK):
        at = first + c
        mask = at < cols
        x = tl.load(scores + r * stride_scores + at, mask=mask, other=float("-inf")).to(tl.float32)
        found = grad * (tl.where(at == token, 1.0, 0.0) - tl.exp(x - peak) * inverse) / heat
        found = tl.where(x > float("-inf"), found, 0.0)
        if HAS_CAP:
            bent = tl.load(logits + r * stride_logits + at, mask=mask, other=0.0).to(tl.float32) / cap
            found = found * (1.0 - bent * bent)
        tl.store(out + r * cols + at, found.to(out.dtype.element_ty), mask=mask)


def logits(
    g: torch.Tensor,
    scores: torch.Tensor,
    capped: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor,
    cap: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """dlogits [R, V] of `dtype`, contiguous.

    g, temperature: [R] fp32. tokens: [R] int64. scores, capped: contiguous [R, V] of any float; capped holds the
    logits after the soft cap, before every other transform. cap: 0 for none.
    """
    rows, cols = scores.shape
    out = torch.empty((rows, cols), dtype=dtype, device=scores.device)
    if rows:
        _logits[(rows,)](
            g.contiguous(),
            scores,
            capped,
            tokens.contiguous(),
            temperature.contiguous(),
            out,
            cols,
            scores.stride(0),
            capped.stride(0),
            cap,
            HAS_CAP=cap > 0,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return out
