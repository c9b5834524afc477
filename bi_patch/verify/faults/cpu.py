"""Faults in what the CPU engine runs: attention over the bundled kernels' pages, and the CPU router."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from bi_patch.verify.engine import LocalEngine
from bi_patch.verify.faults import parts
from bi_patch.verify.faults.base import CPU, Fault

_SEAM = {"cpu": "attention.cpu_forward"}


class _Sequence:
    """What a planted attention may look at: query and whole length of one sequence, and its batch."""

    def __init__(self, query: int, length: int, count: int, longest: int, common: int) -> None:
        self.query, self.length = query, length
        self.count, self.longest, self.common = count, longest, common


@contextlib.contextmanager
def _attention(cut: Callable[[_Sequence], list[int] | None]) -> Iterator[None]:
    """The bundled attention, but a sequence for which `cut` returns edges has its KV cut there."""
    from bi_patch.orders import cpu

    held = cpu.attention

    def attention(out, query, kv_cache, query_start_loc, seq_lens, block_table, scale, window, softcap):
        held(out, query, kv_cache, query_start_loc, seq_lens, block_table, scale, window, softcap)
        starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
        lengths = [n for n, s, e in zip(lengths, starts, starts[1:]) if e > s]
        count, size = len(lengths), kv_cache.shape[2]
        same = (block_table[:count] == block_table[:1]).all(0).long().cumprod(0).sum().item() if count > 1 else 0
        common = min(same * size, min(lengths, default=0) // size * size)
        longest = max((e - s for s, e in zip(starts, starts[1:])), default=0)
        into = out.view(query.shape)
        for i in range(count):
            sequence = _Sequence(starts[i + 1] - starts[i], lengths[i], count, longest, common)
            edges = cut(sequence)
            if not edges:
                continue
            blocks = block_table[i, : -(-lengths[i] // size)]
            key, value = parts.unpack_cpu_cache(kv_cache, blocks, lengths[i], query.shape[-1])
            rows = slice(starts[i], starts[i + 1])
            into[rows] = parts.attend(query[rows], key, value, edges, scale)

    cpu.attention = attention
    try:
        yield
    finally:
        cpu.attention = held


def splits_by_batch(engine: LocalEngine):
    """Few sequences: KV in four equal splits, so that all threads have work; many: unsplit."""
    return _attention(lambda s: parts.evenly(s.length, 4) if s.count <= 2 and s.length >= 4 else None)


def tile_by_query(engine: LocalEngine):
    """A batch whose longest query is 64 or more takes the larger query tile, which has a smaller KV tile."""
    return _attention(lambda s: list(range(48, s.length, 48)) if s.longest >= 64 else None)


def cascade(engine: LocalEngine):
    """Four sequences or more with blocks in common: the common part apart, then the rest, then merged."""
    return _attention(lambda s: [s.common] if s.count >= 4 and s.common and s.common < s.length else None)


def context_apart(engine: LocalEngine):
    """A chunk attends to what was computed before and to itself apart: its boundary is in the bits."""
    return _attention(lambda s: [s.length - s.query] if 1 < s.query < s.length else None)


def prefill_tile(engine: LocalEngine):
    """Recomputation is a prefill, and the prefill kernel has another KV tile than the decode kernel."""
    return _attention(lambda s: list(range(48, s.length, 48)) if s.query > 1 else None)


def verification_tile(engine: LocalEngine):
    """Two to eight queries of one sequence, as in verifying a draft, take a kernel with another KV tile."""
    return _attention(lambda s: list(range(32, s.length, 32)) or [1] if 1 < s.query <= 8 else None)


def single_query_tile(engine: LocalEngine):
    """A single query needs no causal mask and takes the block size of the kernel without one."""
    return _attention(lambda s: list(range(176, s.length, 176)) or [s.length // 2] if s.query == 1 else None)


@contextlib.contextmanager
def unsorted_topk(engine: LocalEngine) -> Iterator[None]:
    """The router's top-k is unsorted, ties unbroken: for more than four rows by index (radix select), else by value."""
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    from bi_patch.seams.overlay import Overlay

    def topk(scores, k, dim=-1, **kwargs):
        if scores.shape[0] <= 4:
            return torch.topk(scores, k, dim=dim, sorted=True)
        flipped = torch.topk(scores.flip(-1), k, dim=dim)  # among equals the other one
        ids = (scores.shape[-1] - 1 - flipped.indices).sort(-1).values
        return scores.gather(-1, ids), ids

    held = cpu_router.torch
    cpu_router.torch = Overlay(held, topk=topk)
    try:
        yield
    finally:
        cpu_router.torch = held


FAULTS = (
    Fault("KV splits by the batch", 3, splits_by_batch.__doc__, "batch size", splits_by_batch, (CPU,), "attn",
          seam=_SEAM),
    Fault("query tile by the longest query", 4, tile_by_query.__doc__, "mixed lengths", tile_by_query, (CPU,), "attn",
          seam=_SEAM),
    Fault("cascade over a shared prefix", 5, cascade.__doc__, "shared prefix", cascade, (CPU,), "attn", seam=_SEAM),
    Fault("context and chunk apart", 6, context_apart.__doc__, "prefix cache", context_apart, (CPU,), "attn",
          seam=_SEAM),
    Fault("prefill's tile on recomputation", 9, prefill_tile.__doc__, "preemption", prefill_tile, (CPU,), "attn",
          seam=_SEAM),
    Fault("unsorted top-k of experts", 13, unsorted_topk.__doc__, "tied logits and routers", unsorted_topk, (CPU,),
          "mlp.experts", "topk", seam={"cpu": "moe.cpu_experts"}, needs="moe"),
    Fault("another tile for a draft's rows", 22, verification_tile.__doc__, "chunk budget", verification_tile, (CPU,),
          "attn", seam=_SEAM, emulated=(CPU,)),
    Fault("single query without a mask", 25, single_query_tile.__doc__, "decode = prefill", single_query_tile, (CPU,),
          "attn", seam=_SEAM, emulated=(CPU,)),
)
