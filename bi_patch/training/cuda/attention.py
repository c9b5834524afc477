"""Causal attention on CUDA: the sampler's FlashAttention 3 in one split, or its Triton attention; a bundled backward.

Layers with a window, in fp32 or with other head sizes than FlashAttention 3's run on vLLM's Triton attention, in the
sampler and here. That kernel keeps no lse, so a bundled kernel computes the lse for the backward.

The sampler's keys and values lie in pages. For FlashAttention 3, contiguous keys and values serve here if they gave the
bits of pages of 16 tokens for the same heads in this process; otherwise keys and values are copied into pages.
"""

from __future__ import annotations

import functools

import torch

from bi_patch.kernels.triton import attention_backward as kernel
from bi_patch.kernels.triton import attention_lse
from bi_patch.ops import bits
from bi_patch.training.cuda import sequences, vllm_kernels

_PAGE = 16  # tokens
# Up to this head size, FlashAttention 3 takes another tile for short queries. The sampler reports a longest query of at
# least _LONG_QUERY tokens there, and so does the trainer.
_SMALL_HEAD, _LONG_QUERY = 64, 128
# Head sizes that the sampler gives to FlashAttention 3.
_SIZES = (64, 80, 96, 112, 128, 192, 256)
_TRIED = (1, 3, 16, 127, 128, 129, 300, 1027, 2500)  # lengths in tokens


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
    """As bi_patch.training.cpu.attention, which states the shapes.

    Returns the output [rows, heads, D] and the log of each row's sum of exponentials [heads, rows] fp32.
    """
    where = sequences.of(starts, lengths, len(query))
    if not where.host:
        return torch.zeros_like(query), query.new_zeros(query.shape[1], len(query), dtype=torch.float32)
    q, k, v = (_rows(x, where) for x in (query, key, value))
    if (backend or backends(query.dtype, query.shape[2], window)[0]) == "TRITON_ATTN":
        out, kept = _triton(q, k, v, where, scale, window, softcap)
    else:
        form = query.shape[1], key.shape[1], query.shape[2], query.dtype, softcap, query.device
        pages = not _contiguous_serves(*form)
        out, kept = _flash(q, k, v, where, scale, softcap, pages)
    if where.rows is None:
        return out, kept
    whole = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    sums = torch.zeros((query.shape[1], len(query)), dtype=torch.float32, device=query.device)
    return whole.index_copy_(0, where.rows, out), sums.index_copy_(1, where.rows, kept)


def backends(dtype: torch.dtype, size: int, window: int) -> tuple[str, ...]:
    """vLLM's backends whose bits a layer can have here, the one that bi_patch chooses first. size: of a head."""
    triton = window or dtype == torch.float32 or size not in _SIZES
    return ("TRITON_ATTN",) if triton else ("FLASH_ATTN", "TRITON_ATTN")


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
    where = sequences.of(starts, lengths, len(query))
    if not where.host:
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    held = [_rows(x, where) for x in (query, key, value, out)]
    sums = kept if where.rows is None else kept.index_select(1, where.rows)
    found = kernel.backward(
        *held, sums, _rows(grad, where), where.starts, where.longest, scale, window or None, softcap
    )
    if where.rows is None:
        return found
    wholes = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    return tuple(whole.index_copy_(0, where.rows, part) for whole, part in zip(wholes, found, strict=True))


def _rows(x: torch.Tensor, where: sequences.Sequences) -> torch.Tensor:
    return x if where.rows is None else x.index_select(0, where.rows)


def _flash(q, k, v, where: sequences.Sequences, scale: float, softcap: float, pages: bool):
    """FlashAttention 3 of packed q, k and v: (output, lse)."""
    told = max(where.longest, _LONG_QUERY) if q.shape[2] <= _SMALL_HEAD else where.longest
    given = {"cu_seqlens_k": where.starts}
    if pages:
        k, v, table = _paged(k, v, where)
        given = {"seqused_k": where.lengths, "block_table": table}
    return vllm_kernels.flash_attention(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=where.starts,
        max_seqlen_q=told,
        max_seqlen_k=where.longest,
        softmax_scale=scale,
        softcap=softcap,
        **given,
    )


def _triton(q, k, v, where: sequences.Sequences, scale: float, window: int, softcap: float):
    """vLLM's Triton attention of packed q, k and v: (output, lse)."""
    pages_k, pages_v, table = _paged(k, v, where)
    out = vllm_kernels.triton_attention(
        q=q,
        k=pages_k,
        v=pages_v,
        cu_seqlens_q=where.starts,
        max_seqlen_q=where.longest,
        seqused_k=where.lengths,
        max_seqlen_k=where.longest,
        softmax_scale=scale,
        window_size=(window - 1, 0) if window else (-1, -1),
        block_table=table,
        softcap=softcap,
    )
    return out, attention_lse.lse(q, k, where.starts, where.longest, scale, window or None, softcap)


def _paged(k, v, where: sequences.Sequences):
    """k and v in pages [pages, _PAGE, kv heads, D], and each sequence's pages [sequences, most] int32."""
    counts = -(-where.lengths.long() // _PAGE)
    ends = counts.cumsum(0)
    firsts = ends - counts
    number = sum(-(-count // _PAGE) for count in where.host)
    begins = where.starts[:-1].long()
    tokens = len(k)
    # Each row's place: its position in the sequence, after the sequence's first page.
    shift = (firsts * _PAGE - begins).repeat_interleave(where.lengths.long(), output_size=tokens)
    at = torch.arange(tokens, device=k.device) + shift
    held = []
    for x in (k, v):
        page = torch.zeros((number * _PAGE, *x.shape[1:]), dtype=x.dtype, device=x.device)
        held.append(page.index_copy_(0, at, x).view(number, _PAGE, *x.shape[1:]))
    most = -(-where.longest // _PAGE)
    table = (firsts[:, None] + torch.arange(most, device=k.device)).clamp_(max=number - 1)
    return *held, table.int()


@functools.cache
def _contiguous_serves(
    heads: int, key_heads: int, size: int, dtype: torch.dtype, softcap: float, device: torch.device
) -> bool:
    """Whether FlashAttention 3 gives contiguous keys and values the bits of pages, flat and peaked scores alike."""
    generator = torch.Generator(device).manual_seed(size)
    lengths = torch.tensor(_TRIED, device=device)
    where = sequences._find(lengths.cumsum(0) - lengths, lengths, sum(_TRIED))

    def random(count):
        return torch.randn(sum(_TRIED), count, size, generator=generator, device=device).to(dtype)

    for factor in (1.0, 6.0):
        q, k, v = random(heads) * factor, random(key_heads), random(key_heads)
        pair = [_flash(q, k, v, where, size**-0.5, softcap, pages) for pages in (True, False)]
        if any(bits.differing(a, b) for a, b in zip(*pair, strict=True)):
            return False
    return True
