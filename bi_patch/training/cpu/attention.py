"""Causal attention on CPU by the bundled kernel over its own pages. The backward sees one sequence at a time."""

from __future__ import annotations

import torch

_PAGE = 128  # tokens; the kernel's order does not depend on it


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of each sequence.

    query: [rows, heads, D]. key, value: [rows, kv heads, D]. starts, lengths: [sequences] int64, the first row and the
    number of rows of each sequence. Rows outside all sequences are padding, and get zeros. window: the number of tokens
    that a token sees, itself included; 0 for all. softcap: 0 for none. backend: vLLM's that serves the sampler's layer,
    or "" for the one that bi_patch chooses.
    Returns the output [rows, heads, D] and what the backward needs besides: on CUDA the log of each row's sum of
    exponentials [heads, rows] fp32, on CPU empty(0).
    """
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    spans = _spans(starts, lengths)
    if not spans:
        return out, query.new_empty(0, dtype=torch.float32)
    rows = torch.cat([torch.arange(first, last) for first, last in spans])
    pages, table, slots = 0, [], []
    for first, last in spans:
        held = -(-(last - first) // _PAGE)
        table.append(range(pages, pages + held))
        slots.append(torch.arange(pages * _PAGE, pages * _PAGE + last - first))
        pages += held
    widest = max(map(len, table))
    cache = torch.empty(pages, key.shape[1], _PAGE, 2 * key.shape[2], dtype=query.dtype)
    torch.ops.bi_cpu.kv_store(key[rows], value[rows], cache, torch.cat(slots))
    counts = torch.tensor([last - first for first, last in spans], dtype=torch.int32)
    begins = torch.cat((torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)))
    blocks = torch.tensor([[*held, *[0] * (widest - len(held))] for held in table], dtype=torch.int32)
    packed = query[rows]
    into = torch.empty_like(packed)
    # The kernel counts the tokens before a token; -1 is none of a window.
    torch.ops.bi_cpu.attention(into, packed, cache, begins, counts, blocks, scale, window - 1, float(softcap))
    return out.index_copy_(0, rows, into), query.new_empty(0, dtype=torch.float32)


def backends(dtype: torch.dtype, size: int, window: int) -> tuple[str, ...]:
    """vLLM's backends whose bits a layer can have here, the one that bi_patch chooses first. size: of a head."""
    return ("CPU_ATTN",)


def attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    kept: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, from grad [rows, heads, D]. out, kept: what the forward returned."""
    grads = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    for first, last in _spans(starts, lengths):
        found = _of_sequence(*(x[first:last].float() for x in (grad, query, key, value)), scale, window, softcap)
        for whole, part in zip(grads, found):
            whole[first:last] = part
    return grads


def _of_sequence(grad, query, key, value, scale, window, softcap):
    """One sequence's gradients in fp32: query [T, heads, D], key and value [T, kv heads, D]."""
    tokens, heads, size = query.shape
    groups = heads // key.shape[1]
    q, g = (x.transpose(0, 1).reshape(-1, groups, tokens, size) for x in (query, grad))
    k, v = (x.transpose(0, 1)[:, None] for x in (key, value))
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap:
        bent = torch.tanh(scores / softcap)
        scores = bent * softcap
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    if window:
        hidden |= torch.ones(tokens, tokens, dtype=torch.bool).tril(-window)
    shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    of_shares = g @ v.transpose(-1, -2)
    of_scores = shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True)) * scale
    if softcap:
        of_scores = of_scores * (1 - bent * bent)
    of_query = (of_scores @ k).reshape(heads, tokens, size)
    of_key, of_value = (of_scores.transpose(-1, -2) @ q).sum(1), (shares.transpose(-1, -2) @ g).sum(1)
    return tuple(x.transpose(0, 1) for x in (of_query, of_key, of_value))


def _spans(starts: torch.Tensor, lengths: torch.Tensor) -> list[tuple[int, int]]:
    """The first row and the end of each sequence that has rows."""
    return [(first, first + count) for first, count in zip(starts.tolist(), lengths.tolist()) if count]
