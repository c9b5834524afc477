"""Paged attention on CPU by the bundled kernel: KV leaves of fixed length at fixed positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def kv_store(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write keys and values [tokens, kv heads, head size] into their slots of the paged cache."""
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
    """Causal attention over the paged cache into `out` [tokens, heads, head size] (or flattened heads).

    window: tokens before its own that a query sees, -1 for all; softcap: 0 for none.
    """
    import torch

    torch.ops.bi_cpu.attention(
        out.view(query.shape), query, kv_cache, query_start_loc, seq_lens, block_table, scale, window, float(softcap)
    )
