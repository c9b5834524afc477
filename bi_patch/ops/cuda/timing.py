"""Times of CUDA calls without the host's part: calls are captured in graphs, whose replays follow each other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

Call = Callable[[], object]


def microseconds(ways: Sequence[Sequence[Call]], replays: int = 5) -> list[float]:
    """The least time of a call of each way, in microseconds. The calls of a way run the same kernels.

    The ways are replayed in turns, so that a clock that changes meets all of them. No graph may be in capture.
    """
    import torch

    for calls in ways:
        calls[0]()  # loads its kernels
    torch.cuda.synchronize()
    graphs = [_capture(calls) for calls in ways]
    marks = [[(_event(), _event()) for _ in range(replays)] for _ in ways]
    # Nothing waits in between: the next replay is in the queue before one ends.
    for turn in range(replays):
        for graph, marked in zip(graphs, marks, strict=True):
            start, end = marked[turn]
            start.record()
            graph.replay()
            end.record()
    torch.cuda.synchronize()
    return [
        min(start.elapsed_time(end) for start, end in marked) * 1000 / len(calls)
        for calls, marked in zip(ways, marks, strict=True)
    ]


def once(call: Call) -> float:
    """Microseconds of one call whose kernel is loaded; for a short one, the host's."""
    call()
    start, end = _event(), _event()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


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

    # Not torch.cuda.graph: it gives all cached memory back first, which hundreds of graphs cannot wait for.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_stream()):
        graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    return graph
