"""Paged attention on CPU by the bundled kernel, which reduces KV in leaves of fixed length at fixed positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def kv_store(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write key and value [tokens, kv heads, head size] into the slots `slot_mapping` [tokens] of the paged cache.

    kv_cache: [blocks, kv heads, block size, 2 * head size]. slot_mapping: int64; a negative slot is skipped.
    """
    import torch

    torch.ops.bi_cpu.kv_store(key, value, kv_cache, slot_mapping)


def scratch(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, heads: int, block_size: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A paged cache of one step, for layers that keep none: (cache, block table, slots).

    Every sequence of the step is whole: it has all its tokens in query_start_loc [sequences + 1]. seq_lens:
    [sequences]. heads: KV heads. The cache is [blocks, heads, block_size, 2 * dim] of `dtype`, the block table
    [sequences, blocks] int32, the slots [tokens] int64. Raises ValueError for a sequence in parts.
    """
    import torch

    lens = seq_lens.to(torch.int64)
    if not torch.equal(query_start_loc.diff().to(torch.int64), lens):
        raise ValueError("attention without a cache needs whole sequences")
    blocks = -(-lens // block_size)
    first = blocks.cumsum(0) - blocks
    table = (first[:, None] + torch.arange(int(blocks.max()))).to(torch.int32)
    total = int(blocks.sum())
    starts = first * block_size - query_start_loc[:-1].to(torch.int64)
    slots = torch.arange(int(lens.sum())) + starts.repeat_interleave(lens)
    # A sequence's last block may have more entries in the table than blocks: those are never read.
    cache = torch.zeros(total, heads, block_size, 2 * dim, dtype=dtype)
    return cache, table.clamp_(max=total - 1), slots


def attention(
    out: torch.Tensor,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    causal: bool = True,
) -> None:
    """Write attention over the paged cache into `out`.

    query: [tokens, heads, head size]. out: query's shape, or [tokens, heads * head size]. kv_cache: as for kv_store.
    query_start_loc: [sequences + 1] int32, where each sequence's queries begin. seq_lens: [sequences] int32.
    block_table: [sequences, blocks] int32. window: the number of earlier tokens that a query sees; -1 for all.
    softcap: 0 for none. causal: False for encoders, where a query also sees the tokens after it, with a window as many
    as before it.
    """
    import torch

    torch.ops.bi_cpu.attention(
        out.view(query.shape),
        query,
        kv_cache,
        query_start_loc,
        seq_lens,
        block_table,
        scale,
        window,
        float(softcap),
        causal,
    )
