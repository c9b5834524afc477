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
) -> None:
    """Write causal attention over the paged cache into `out`.

    query: [tokens, heads, head size]. out: query's shape, or [tokens, heads * head size]. kv_cache: as for kv_store.
    query_start_loc: [sequences + 1] int32, where each sequence's queries begin. seq_lens: [sequences] int32.
    block_table: [sequences, blocks] int32. window: the number of earlier tokens that a query sees; -1 for all.
    softcap: 0 for none.
    """
    import torch

    torch.ops.bi_cpu.attention(
        out.view(query.shape), query, kv_cache, query_start_loc, seq_lens, block_table, scale, window, float(softcap)
    )
