"""The log of each row's sum of exponentials in causal attention over packed sequences, for a forward that keeps none.

lse[h, t] = log(sum over the keys that t sees of exp(score)), natural, fp32; q [T, H, D], k [T, G, D], with windows and
soft caps as in attention_backward.

Order: tiles start at each sequence's first token. One program takes a block of queries of one head, and adds blocks of
keys in ascending order, rescaled whenever a row's maximum grows.
"""

import torch
import triton
import triton.language as tl

from .attention_backward import _LOG2E, _SMALLEST, _seen, _tile

_BLOCKS = {2: 64, 4: 32}  # rows of queries and of keys, by bytes an element


@triton.jit(do_not_specialize=["blocks", "window", "stride_lse"])
def _lse(
    q,
    k,
    lse,
    starts,
    blocks,
    scale,
    cap,
    window,
    stride_q,
    stride_k,
    stride_lse,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    start = tl.load(starts + tl.program_id(2))
    length = tl.load(starts + tl.program_id(2) + 1) - start
    first = (blocks - 1 - tl.program_id(0)) * QUERIES
    if first >= length:
        return
    head = tl.program_id(1)
    row = start.to(tl.int64)
    query = first + tl.arange(0, QUERIES)
    held = _tile(q + row * stride_q + head * D, query, length, stride_q, D, WIDTH)
    k += row * stride_k + head // GROUP * D
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(first - window + 1, 0) // KEYS * KEYS
    most = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    for at in range(low, tl.minimum(first + QUERIES, length), KEYS):
        key = at + tl.arange(0, KEYS)
        scores = tl.dot(held, tl.trans(_tile(k, key, length, stride_k, D, WIDTH)), input_precision="ieee") * scale
        if HAS_CAP:
            scores = cap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * _LOG2E / cap)) + 1.0))
        scores = tl.where(_seen(query[:, None], key[None, :], window, HAS_WINDOW), scores, float("-inf"))
        peak = tl.maximum(most, tl.max(scores, axis=1))
        shift = tl.where(peak > float("-inf"), peak, 0.0)
        total = total * tl.exp2((most - shift) * _LOG2E)
        total += tl.sum(tl.exp2((scores - shift[:, None]) * _LOG2E), axis=1)
        most = peak
    tl.store(lse + head.to(tl.int64) * stride_lse + row + query, most + tl.log(total), mask=query < length)


def lse(
    q: torch.Tensor,
    k: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None = None,
    cap: float = 0.0,
) -> torch.Tensor:
    """[H, T] fp32 from q [T, H, D] and k [T, G, D]; the arguments of attention_backward.backward. Heads are packed."""
    tokens, heads, size = q.shape
    out = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    q, k = q.contiguous(), k.contiguous()
    if not tokens:
        return out
    block = _BLOCKS[q.element_size()]
    blocks = triton.cdiv(longest, block)
    _lse[(blocks, heads, len(starts) - 1)](
        q,
        k,
        out,
        starts,
        blocks,
        scale,
        cap,
        window or 0,
        q.stride(0),
        k.stride(0),
        out.stride(0),
        GROUP=heads // k.shape[1],
        D=size,
        WIDTH=max(_SMALLEST, triton.next_power_of_2(size)),
        HAS_CAP=cap > 0,
        HAS_WINDOW=window is not None,
        QUERIES=block,
        KEYS=block,
        num_warps=4,
        num_stages=2,
    )
    return out
