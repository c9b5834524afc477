"""Times of CUDA calls without the host's part. Calls are captured in graphs, which are replayed back to back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

Call = Callable[[], object]
_SETTLED = 1.05  # the second least time over the least: another process disturbed fewer replays than all but one
_BATCHES = 4  # of replays, at most


def microseconds(ways: Sequence[Sequence[Call]], replays: int = 5) -> list[float]:
    """The least time of a call of each way, in microseconds. A way is a list of calls that run the same kernels.

    The ways are replayed in turns, so that a change of the GPU's clock affects all ways. Where another process uses the
    GPU meanwhile, few of the times agree: then the ways are replayed again, a few times at most. The caller must not
    be capturing a graph.
    """
    import torch

    for calls in ways:
        calls[0]()  # loads the kernels
    torch.cuda.synchronize()
    graphs = [_capture(calls) for calls in ways]
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(_BATCHES):
        for calls, held, found in zip(ways, times, _replayed(graphs, replays), strict=True):
            held += (ms * 1000 / len(calls) for ms in found)
        if all(len(held) < 2 or sorted(held)[1] <= _SETTLED * min(held) for held in times):
            break
    return [min(held) for held in times]


def _replayed(graphs: Sequence, replays: int) -> list[list[float]]:
    """Milliseconds of each replay of each graph."""
    import torch

    marks = [[(_event(), _event()) for _ in range(replays)] for _ in graphs]
    # The host does not wait between replays: the next replay is in the queue before the current replay ends.
    for turn in range(replays):
        for graph, marked in zip(graphs, marks, strict=True):
            start, end = marked[turn]
            start.record()
            graph.replay()
            end.record()
    torch.cuda.synchronize()
    return [[start.elapsed_time(end) for start, end in marked] for marked in marks]


def once(call: Call, times: int = 3) -> float:
    """Microseconds of one call, the least of a few, after a first call that loads its kernel. For a short call, this is
    the host's time."""
    call()
    found = []
    for _ in range(times):
        start, end = _event(), _event()
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1000)
    return min(found)


def _event():
    import torch

    return torch.cuda.Event(enable_timing=True)


@functools.cache
def _stream():
    import torch

    return torch.cuda.Stream()  # the default stream cannot be captured


def _capture(calls: Sequence[Call]):
    """A graph of the calls."""
    import torch

    # Not torch.cuda.graph: it first frees all cached memory, which takes too long for hundreds of graphs.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_stream()):
        graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    return graph
