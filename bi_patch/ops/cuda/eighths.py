"""Attention over an e4m3 KV cache on Hopper, in one order for prompts and for single queries.

Keys and values are those of the cache in 16 bits (kernels/triton/eighths.py). Single queries of a step go to the
bundled decode kernel, which converts pages itself. For all other queries, the pages of their requests are copied in 16
bits to a scratch, over which FlashAttention 3 runs. Both have the order of FlashAttention 3's 16-bit prefill: a
certificate compares them (ops/cuda/attention.py). So the split of a step changes no bit.

The scratch has a fixed size. Requests whose copies do not fit together run one after the other, and a request that does
not fit by itself runs in groups of key heads. A row's order knows nothing of other requests and other heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

PAGE = 128  # tokens of a page of the scratch: kernels/triton/eighths.py
LEAST_TOKENS = 8192  # that the scratch has room for: more than a certificate's prompt has
MOST_BYTES = 256 << 20  # of the scratch, unless one key head of the longest request takes more
_scratch: list[torch.Tensor] = []


class Run(NamedTuple):
    """Requests of a step that run at once over the scratch.

    requests, tokens: the first and the one after the last, of the step. starts [requests + 1]: where each request's
    tokens begin, from `tokens` on. lengths [requests]: keys, 0 for a single query between them, whose row is of no
    use. owners, bases: of the copy. table [requests, most]: pages of the copy. longest_query, longest: the most new
    tokens, and the most keys or more. heads: key heads at a time.
    """

    requests: tuple[int, int]
    tokens: tuple[int, int]
    starts: torch.Tensor
    lengths: torch.Tensor
    owners: torch.Tensor
    bases: torch.Tensor
    table: torch.Tensor
    longest_query: int
    longest: int
    heads: int


class Singles(NamedTuple):
    """Queries of a step that the decode kernel computes. rows, requests: of the step, a slice or numbers. starts
    [requests + 1], lengths [requests]."""

    rows: slice | torch.Tensor
    requests: slice | torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor


class Step(NamedTuple):
    """How the queries of a step are computed: first the runs, then the single queries."""

    runs: list[Run]
    singles: Singles | None


def bytes_of(key_heads: int, head_size: int, longest: int, most_tokens: int) -> int:
    """Bytes of the scratch. longest: tokens of the longest request that the engine takes. most_tokens: new tokens of a
    step."""
    longest = max(longest, LEAST_TOKENS)
    page = 2 * PAGE * head_size * 2  # of one key head
    one, common = pages_of(longest), pages_of(longest) + pages_of(most_tokens)
    return max(one * page, min(common * key_heads * page, MOST_BYTES))


def pages_of(tokens: int) -> int:
    """Pages of the scratch that this many tokens of a request take."""
    return -(-tokens // PAGE)


def reserve(size: int, device: str = "cuda") -> None:
    """Make the scratch, of `size` bytes or more. vLLM's memory profile comes later, and finds it in use."""
    import torch

    if not _scratch or _scratch[0].numel() < size:
        _scratch[:] = [torch.zeros(size, dtype=torch.uint8, device=device)]


def room(head_size: int) -> int:
    """How many pages of one key head the scratch has. Raises RuntimeError without a scratch."""
    if not _scratch:
        raise RuntimeError("bi_patch: an e4m3 KV cache has no scratch")
    return _scratch[0].numel() // (2 * PAGE * head_size * 2)


def widened(k, v, scales, table, run: Run, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of a run's requests in 16 bits, [pages, PAGE, key heads, D]; the next call overwrites them.

    k, v [pages, page size, key heads, D]: e4m3. scales [key heads], table [requests of the run, most]: of these.
    """
    from bi_patch.kernels.triton import eighths

    heads, size = k.shape[2:]
    shape = (len(run.owners), PAGE, heads, size)
    numbers = len(run.owners) * PAGE * heads * size
    held = _scratch[0].view(dtype)
    keys, values = held[:numbers].view(shape), held[numbers : 2 * numbers].view(shape)
    eighths.widen(k, v, scales, table, run.lengths, run.owners, run.bases, keys, values)
    return keys, values


def plan(
    counts: Sequence[int],
    most: Sequence[int],
    starts: torch.Tensor,
    lengths: torch.Tensor,
    key_heads: int,
    pages: int,
    few: bool = False,
) -> Step:
    """How to compute a step.

    counts: new tokens of each request. most: keys of each request, or more, on the host. starts [requests + 1], lengths
    [requests]: int32, on the device. pages: `room`. few: whether the decode kernel is faster for all queries. Raises
    ValueError for a request that does not fit into the scratch.
    """
    single = [count == 1 or (few and count > 0) for count in counts]
    begins = [0]
    for count in counts:
        begins.append(begins[-1] + count)
    groups: list[list[int]] = []  # requests of each run
    taken = pages * key_heads + 1
    for i, count in enumerate(counts):
        if single[i] or count == 0:
            continue
        own = pages_of(most[i]) * key_heads
        if taken + own > pages:
            groups.append([])
            taken = 0
        groups[-1].append(i)
        taken += own
    runs = [_run(group, counts, begins, most, starts, lengths, key_heads, pages) for group in groups]
    return Step(runs, _singles([i for i, alone in enumerate(single) if alone], counts, begins, starts, lengths))


def _run(group, counts, begins, most, starts, lengths, key_heads, pages) -> Run:
    import torch

    first, end = group[0], group[-1] + 1
    inside = set(group)
    own = [pages_of(most[i]) if i in inside else 0 for i in range(first, end)]
    number = sum(own)
    heads = next((n for n in range(key_heads, 0, -1) if key_heads % n == 0 and number * n <= pages), 0)
    if not heads:
        raise ValueError(
            f"bi_patch: {max(most[i] for i in group)} keys do not fit into the scratch of an e4m3 KV cache"
        )
    bases, owners = [], []
    for i, count in enumerate(own):
        bases.append(len(owners))
        owners += [i] * count
    widest = max(own)
    # A row's table goes on past the row's pages, where nothing reads it, but with pages that exist.
    table = (torch.tensor(bases)[:, None] + torch.arange(widest)).clamp_(max=number - 1)
    kept = torch.tensor([i in inside for i in range(first, end)])
    owners, bases, table, kept = _move([torch.tensor(owners), torch.tensor(bases), table, kept], starts.device)
    held = lengths[first:end]
    return Run(
        (first, end),
        (begins[first], begins[end]),
        starts[first : end + 1] - begins[first],
        held if len(inside) == end - first else held * kept,
        owners,
        bases,
        table,
        max(counts[i] for i in group),
        max(most[i] for i in group),
        heads,
    )


def _singles(which: list[int], counts, begins, starts, lengths) -> Singles | None:
    import torch

    if not which:
        return None
    first, end = which[0], which[-1] + 1
    if sum(counts[first:end]) == sum(counts[i] for i in which):  # nothing but these has tokens there
        own = slice(first, end)
        return Singles(slice(begins[first], begins[end]), own, starts[first : end + 1] - begins[first], lengths[own])
    rows = [row for i in which for row in range(begins[i], begins[i + 1])]
    edges = [0]
    for i in which:
        edges.append(edges[-1] + counts[i])
    rows, requests, edges = _move([torch.tensor(x) for x in (rows, which, edges)], starts.device)
    return Singles(rows.long(), requests, edges, lengths.index_select(0, requests))


def _move(given: list[torch.Tensor], device) -> list[torch.Tensor]:
    """Integers on the host as int32 on the device, in one copy. Each begins at a multiple of 16 bytes."""
    import torch

    parts, at = [], 0
    for x in given:
        parts.append((at, x.shape))
        at += -(-x.numel() // 4) * 4
    packed = torch.empty(at, dtype=torch.int32, pin_memory=torch.device(device).type == "cuda")
    for (begin, _), x in zip(parts, given):
        packed[begin : begin + x.numel()] = x.reshape(-1)
    moved = packed.to(device, non_blocking=True)
    return [moved[begin : begin + shape.numel()].view(shape) for begin, shape in parts]
