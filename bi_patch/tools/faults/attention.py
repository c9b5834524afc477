"""Faults of attention: KV is cut where the reduction order forbids a cut, for the sequences that a cause affects."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from bi_patch.tools.faults import parts
from bi_patch.tools.faults.base import BOTH, CPU, CUDA, Fault, platform
from bi_patch.tools.verify.engine import LocalEngine
from bi_patch.tools.verify.runner import model_runner, replaced

_SEAM = {"cpu": "attention.cpu_forward", "cuda": "attention.cuda_backend"}


class _Sequence:
    """One sequence and its batch, as a Cut sees them.

    query: the sequence's query rows. length: its KV positions. count: sequences in the batch. longest: the batch's
    longest query. common: positions in blocks that all sequences share.
    """

    def __init__(self, query: int, length: int, count: int, longest: int, common: int) -> None:
        self.query, self.length = query, length
        self.count, self.longest, self.common = count, longest, common


Cut = Callable[[_Sequence], "list[int] | None"]


def _attention(engine: LocalEngine, cut: Cut) -> contextlib.AbstractContextManager[None]:
    """The platform's own attention, except that the KV of a sequence is cut at the edges that `cut` returns."""
    return _on_cpu(cut) if platform() == CPU else _on_cuda(engine, cut)


@contextlib.contextmanager
def _on_cpu(cut: Cut) -> Iterator[None]:
    from bi_patch.ops.cpu import attention as op

    held = op.attention

    def attention(out, query, kv_cache, query_start_loc, seq_lens, block_table, scale, *how):
        held(out, query, kv_cache, query_start_loc, seq_lens, block_table, scale, *how)
        size, d = kv_cache.shape[2], query.shape[-1]
        read = lambda blocks, length: parts.unpack_cpu_cache(kv_cache, blocks, length, d)  # noqa: E731
        overwrite(cut, out.view(query.shape), query, query_start_loc, seq_lens, block_table, size, read, scale)

    op.attention = attention
    try:
        yield
    finally:
        op.attention = held


@contextlib.contextmanager
def _on_cuda(engine: LocalEngine, cut: Cut) -> Iterator[None]:
    context = model_runner(engine).vllm_config.compilation_config.static_forward_context

    def wrap(held, impl):
        def forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
            result = held(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            if attn_metadata is not None:
                d, m = impl.head_size, attn_metadata
                size = _pages(kv_cache, d).shape[2]
                read = lambda blocks, length: _unpack(kv_cache, blocks, length, d)  # noqa: E731
                overwrite(
                    cut,
                    output.view(-1, impl.num_heads, d),
                    query.view(-1, impl.num_heads, d),
                    m.query_start_loc,
                    m.seq_lens,
                    m.block_table,
                    size,
                    read,
                    impl.scale,
                )
            return result

        return forward

    with contextlib.ExitStack() as stack:
        for layer in context.values():
            if hasattr(layer, "impl"):
                stack.enter_context(replaced(layer.impl, "forward", lambda held, of=layer.impl: wrap(held, of)))
        yield


def _pages(kv_cache: torch.Tensor, d: int):
    """vLLM's cache as [keys and values, blocks, tokens, kv heads, D], for the layout of every supported release."""
    if kv_cache.dim() == 4 and kv_cache.shape[-1] == 2 * d:
        return _Halves(kv_cache, d)
    return kv_cache if kv_cache.shape[0] == 2 else kv_cache.transpose(0, 1)


class _Halves:
    """[blocks, kv heads, tokens, 2 * D] read as [2, blocks, tokens, kv heads, D] without a copy."""

    def __init__(self, kv_cache: torch.Tensor, d: int) -> None:
        self._halves = kv_cache.transpose(1, 2).split(d, dim=-1)
        self.shape = (2, *self._halves[0].shape)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._halves[index]


def _unpack(kv_cache: torch.Tensor, blocks: torch.Tensor, length: int, d: int):
    pages = _pages(kv_cache, d)
    return tuple(pages[i][blocks.long()].flatten(0, 1)[:length] for i in (0, 1))


def overwrite(
    cut: Cut, out, query, query_start_loc, seq_lens, block_table, size, read, scale, attend=parts.attend
) -> None:
    """Overwrite the rows of each sequence for which `cut` returns edges.

    out, query: [tokens, heads, D]. size: tokens of a page. read(blocks, length) -> the sequence's keys and values.
    attend: as parts.attend, which computes the rows.
    """
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    lengths = [n for n, s, e in zip(lengths, starts, starts[1:]) if e > s]
    count = len(lengths)
    same = (block_table[:count] == block_table[:1]).all(0).long().cumprod(0).sum().item() if count > 1 else 0
    common = min(same * size, min(lengths, default=0) // size * size)
    longest = max((e - s for s, e in zip(starts, starts[1:])), default=0)
    for i in range(count):
        edges = cut(_Sequence(starts[i + 1] - starts[i], lengths[i], count, longest, common))
        if edges:
            key, value = read(block_table[i, : -(-lengths[i] // size)], lengths[i])
            rows = slice(starts[i], starts[i + 1])
            out[rows] = attend(query[rows], key, value, edges, scale)


def splits_by_batch(engine: LocalEngine):
    """With one or two sequences, KV has four equal splits, so that all threads have work; with more, no splits."""
    return _attention(engine, lambda s: parts.evenly(s.length, 4) if s.count <= 2 and s.length >= 4 else None)


def tile_by_query(engine: LocalEngine):
    """A batch whose longest query has 64 rows or more takes the larger query tile, which has a smaller KV tile."""
    return _attention(engine, lambda s: list(range(16, s.length, 48)) if s.longest >= 64 else None)


def cascade(engine: LocalEngine):
    """With four or more sequences that share blocks, the shared part and the rest are computed apart and merged."""
    return _attention(engine, lambda s: [s.common] if s.count >= 4 and s.common and s.common < s.length else None)


def context_apart(engine: LocalEngine):
    """A chunk attends to earlier positions and to itself separately, so the bits depend on the chunk's boundary."""
    return _attention(engine, lambda s: [s.length - s.query] if 1 < s.query < s.length else None)


def prefill_tile(engine: LocalEngine):
    """The prefill kernel, which also recomputes preempted requests, has another KV tile than the decode kernel."""
    return _attention(engine, lambda s: list(range(4, s.length, 48)) if s.query > 1 else None)


def verification_tile(engine: LocalEngine):
    """Two to eight queries of a sequence, as in the check of a draft, take a kernel with another KV tile."""
    return _attention(engine, lambda s: list(range(32, s.length, 32)) or [1] if 1 < s.query <= 8 else None)


def single_query_tile(engine: LocalEngine):
    """A single query needs no causal mask, so it takes the block size of the kernel without a mask."""
    return _attention(engine, lambda s: list(range(176, s.length, 176)) or [s.length // 2] if s.query == 1 else None)


FAULTS = (
    Fault(
        "KV splits by the batch",
        3,
        splits_by_batch.__doc__,
        "batch size",
        splits_by_batch,
        BOTH,
        "attn",
        seam=_SEAM,
        emulated=(CUDA,),
    ),
    Fault(
        "query tile by the longest query",
        4,
        tile_by_query.__doc__,
        "mixed lengths",
        tile_by_query,
        BOTH,
        "attn",
        seam=_SEAM,
        emulated=(CUDA,),
    ),
    Fault(
        "cascade over a shared prefix",
        5,
        cascade.__doc__,
        "shared prefix",
        cascade,
        BOTH,
        "attn",
        seam=_SEAM,
        emulated=(CUDA,),
    ),
    Fault(
        "context and chunk apart",
        6,
        context_apart.__doc__,
        "prefix cache",
        context_apart,
        BOTH,
        "attn",
        seam=_SEAM,
        emulated=(CUDA,),
    ),
    Fault(
        "prefill's tile on recomputation",
        9,
        prefill_tile.__doc__,
        "preemption",
        prefill_tile,
        BOTH,
        "attn",
        seam=_SEAM,
        emulated=(CUDA,),
    ),
    Fault(
        "another tile for a draft's rows",
        22,
        verification_tile.__doc__,
        "chunk budget",
        verification_tile,
        BOTH,
        "attn",
        seam=_SEAM,
        emulated=BOTH,
    ),
    Fault(
        "single query without a mask",
        25,
        single_query_tile.__doc__,
        "decode = prefill",
        single_query_tile,
        BOTH,
        "attn",
        seam=_SEAM,
        emulated=BOTH,
    ),
)
