"""Times of CUDA calls without the host's part. Calls are captured in graphs, which are replayed back to back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

Call = Callable[[], object]


def microseconds(ways: Sequence[Sequence[Call]], replays: int = 5) -> list[float]:
    """The least time of a call of each way, in microseconds. A way is a list of calls that run the same kernels.

    The ways are replayed in turns, so that a change of the GPU's clock affects all ways. The caller must not be
    capturing a graph.
    """
    import torch

    for calls in ways:
        calls[0]()  # loads the kernels
    torch.cuda.synchronize()
    graphs = [_capture(calls) for calls in ways]
    marks = [[(_event(), _event()) for _ in range(replays)] for _ in ways]
    # The host does not wait between replays: the next replay is in the queue before the current replay ends.
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
    """Microseconds of one call, after a first call that loads its kernel. For a short call, this is the host's time."""
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
