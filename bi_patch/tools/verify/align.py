"""Finds the first call that differs between two traces of one request.

Calls are ordered by token position, then by execution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from bi_patch.tools.verify.trace import CACHE, WIDTH, Call, Trace

Label = tuple[str, str, int, tuple[int, ...], str]


@dataclass(frozen=True)
class First:
    """Where two traces part: the calls of both sides at the earliest position that differs.

    only_alone, only_company: calls of one side only, between the last call that both sides have and the first
    difference.
    """

    position: int
    alone: Call
    company: Call
    only_alone: tuple[Call, ...] = ()
    only_company: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Compared:
    """The result of a comparison. first: None when all compared digests are equal. compared: pairs of digests."""

    first: First | None
    compared: int


@dataclass
class _Segment:
    """The calls of one phase of one step on the same rows. places: the index of each call in the whole trace."""

    phase: str
    start: int
    rows: int
    calls: list[Call]
    places: list[int]


def compare(alone: Trace, company: Trace) -> Compared:
    """Compare every computation of a position with the position's first computation in `alone`.

    The later computations in `alone` itself are compared as well as those in `company`.
    """
    reference = _segments(alone)
    others = [*_segments(company), *reference]
    by_phase: dict[str, list[_Segment]] = {}
    for segment in reference:
        by_phase.setdefault(segment.phase, []).append(segment)
    best: tuple[tuple[int, int], First] | None = None
    compared = 0
    for other in others:
        for expected, start, end in _first_visits(by_phase.get(other.phase, []), other):
            if expected is other:
                continue
            found, count = _part(expected, other, start, end)
            compared += count
            if found is not None:
                order, first = found
                key = (first.position, order)
                if best is None or key < best[0]:
                    best = (key, first)
    return Compared(best[1] if best else None, compared)


def _segments(trace: Trace) -> list[_Segment]:
    found: dict[tuple[str, int, int, int], _Segment] = {}
    for place, call in enumerate(trace.calls):
        key = (call.phase, call.step, call.position, call.rows)
        segment = found.setdefault(key, _Segment(call.phase, call.position, call.rows, [], []))
        segment.calls.append(call)
        segment.places.append(place)
    return list(found.values())


def _first_visits(reference: Sequence[_Segment], other: _Segment) -> Iterator[tuple[_Segment, int, int]]:
    """Spans of the positions of `other`, each with the first segment of the reference that computed the span."""
    position, end = other.start, other.start + other.rows
    while position < end:
        first = next((s for s in reference if s.start <= position < s.start + s.rows), None)
        if first is None:
            position = min((s.start for s in reference if s.start > position), default=end)
            continue
        # A segment that comes earlier in the reference may begin inside this span and is the first visit from there on.
        earlier = reference[: reference.index(first)]
        until = min([first.start + first.rows, end, *(s.start for s in earlier if position < s.start)])
        yield first, position, until
        position = until


def _part(a: _Segment, b: _Segment, start: int, end: int) -> tuple[tuple[int, First] | None, int]:
    """The first difference of two segments in [start, end), with its place in the trace, and the digests compared."""
    best: tuple[int, int, First] | None = None
    pairs = _pairs(a.calls, b.calls)
    compared = 0
    for i, j, gap in pairs:
        x, y = a.calls[i], b.calls[j]
        until = end if best is None else min(end, best[0])  # only an earlier position can win now
        left = x.digests[(start - x.position) * WIDTH : (until - x.position) * WIDTH]
        right = y.digests[(start - y.position) * WIDTH : (until - y.position) * WIDTH]
        compared += until - start
        if left == right:
            continue
        at = next(p for p in range(start, until) if x.digest(p) != y.digest(p))
        best = (at, b.places[j], First(at, x, y, *gap))
    return ((best[1], best[2]) if best else None), compared


_Gap = tuple[tuple[Call, ...], tuple[Call, ...]]


def _pairs(a: Sequence[Call], b: Sequence[Call]) -> list[tuple[int, int, _Gap]]:
    """Pairs of calls with the same label, in order. Each comes with the unpaired calls right before the pair."""
    left, right = [_label(c) for c in a], [_label(c) for c in b]
    if left == right:
        return [(i, i, ((), ())) for i in range(len(a))]
    pairs: list[tuple[int, int, _Gap]] = []
    i = j = 0
    for block in SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks():
        for k in range(block.size):
            gap = (tuple(a[i : block.a + k]), tuple(b[j : block.b + k]))
            pairs.append((block.a + k, block.b + k, gap))
            i, j = block.a + k + 1, block.b + k + 1
    return pairs


def _label(call: Call) -> Label:
    return call.module, call.op, call.output, call.shape[1:] if call.op != CACHE else (), call.dtype
