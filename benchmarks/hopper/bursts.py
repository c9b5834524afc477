"""GPU times of an engine of several ranks, free of the wait of one rank for another.

A rank's kernels for sums over ranks wait until the other ranks have come as far. In an engine's steps this wait is the
skew of the hosts' times, so a profile of one rank shows the host. Here no host stands between:

- The CUDA graph of a decode step is replayed many times in a row on all ranks, which the sums keep in step. The time of
  a replay, between two CUDA events, holds the layers and all their sums.
- What a step runs outside its graph (the head, the gathering of logits, sampling) is profiled in steps that leave the
  graph out.
- A prefill is profiled several times.

Of profiles: of each launch the median over the repeats, and the shortest of a sum over ranks or a gathering, which is
that of the repeat in which this rank came last.
"""

from __future__ import annotations

import contextlib
import re
import statistics
from collections.abc import Callable, Iterator

import torch

WINDOWS, REPLAYS, FIRST = 7, 16, 4  # windows of replays; replays before the first
STEPS, PREFILLS = 12, 5
BUDGET = 8192  # tokens of a step (costs.py)
_BETWEEN_RANKS = re.compile("cross_device|nccl|all_?reduce|all_?gather|reduce_?scatter", re.IGNORECASE)


class NotOneGraph(RuntimeError):
    """A decode step is not one CUDA graph."""


class Graphs:
    """What happens at each replay of a CUDA graph: as it is, a burst of timed replays, or nothing."""

    def __init__(self, replay: Callable[[torch.cuda.CUDAGraph], None]) -> None:
        self._replay, self._do = replay, replay
        self.windows: list[float] = []  # milliseconds of a replay
        self.count = 0

    def __call__(self, graph: torch.cuda.CUDAGraph) -> None:
        self.count += 1
        self._do(graph)

    def burst(self) -> None:
        self.count, self._do = 0, self._burst

    def skip(self) -> None:
        self.count, self._do = 0, lambda graph: None

    def _burst(self, graph: torch.cuda.CUDAGraph) -> None:
        for _ in range(FIRST):
            self._replay(graph)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(WINDOWS + 1)]
        marks[0].record()
        for mark in marks[1:]:
            for _ in range(REPLAYS):
                self._replay(graph)
            mark.record()
        marks[-1].synchronize()
        self.windows = [a.elapsed_time(b) / REPLAYS for a, b in zip(marks, marks[1:], strict=False)]


@contextlib.contextmanager
def graphs() -> Iterator[Graphs]:
    """Within this context, replays of CUDA graphs go through the Graphs it gives."""
    kind = torch.cuda.CUDAGraph
    before = kind.replay
    held = Graphs(before)
    kind.replay = lambda graph: held(graph)
    try:
        yield held
    finally:
        kind.replay = before


def gpu_cost(engine, number: int, length: int) -> dict:
    """Milliseconds of the GPU in a decode step, in its CUDA graph (graph_ms) and in all (gpu_typical_ms, gpu_ms), and,
    where the prompts fill one step, seconds of kernels in a prefill.

    engine: child.Engine, in the same step on every rank. Raises NotOneGraph.
    """
    import child

    seen: set[str] = set()
    engine.forget()
    for i in range(number):
        engine.add(engine.prompt(77000 + i, length), STEPS + 24 + number * length // BUDGET)
    engine.on_step = lambda outputs: seen.update(o.request_id for o in outputs if o.outputs[0].token_ids)
    while len(seen) < number:
        engine.step()
    for _ in range(3):
        engine.step()
    with graphs() as held:
        held.burst()
        engine.step()
        burst = held.count
        held.skip()
        engine.step()
        left = iter(range(STEPS, -1, -1))
        rest = child.traced(engine, lambda: not next(left), [torch.profiler.ProfilerActivity.CUDA])
    engine.on_step = None
    engine.run()
    if burst != 1:
        raise NotOneGraph(f"a decode step of {number} requests replayed {burst} CUDA graphs, not one")
    outside, graph = total(rest, STEPS), statistics.median(held.windows)
    found = {"graph_ms": graph, "graph_windows": held.windows, "outside_ms": outside / 1000}
    found |= {"gpu_ms": graph + outside / 1000, "gpu_typical_ms": graph + outside / 1000}
    if number * length == BUDGET:
        found |= {"gpu_prefill_s": total(prefills(engine, number, length), PREFILLS) / 1e6}
    return found


def prefills(engine, number: int, length: int):
    """A profile of PREFILLS prefills of other prompts of the same lengths."""
    import child

    child.cost(engine, number, length, 4, 78)  # the libraries load their kernels

    def again() -> bool:
        if not engine.llm.llm_engine.has_unfinished_requests():
            engine.forget()
            if (seed := next(left, None)) is None:
                return True
            for i in range(number):
                engine.add(engine.prompt(79000 + 100 * seed + i, length), 1)
        return False

    left = iter(range(PREFILLS))
    return child.traced(engine, again, [torch.profiler.ProfilerActivity.CUDA])


def total(held, repeats: int) -> float:
    """Microseconds of the GPU's kernels in one of `repeats` equal parts of a profile. Of kernels that not every part
    launches as often: the mean."""
    from torch.autograd import DeviceType

    launches: dict[str, list[tuple[float, float]]] = {}
    for event in held.events():
        if event.device_type == DeviceType.CUDA:
            launches.setdefault(event.name, []).append((event.time_range.start, event.self_device_time_total))
    return sum(typical(name, [us for _, us in sorted(found)], repeats) for name, found in launches.items())


def typical(name: str, us: list[float], repeats: int) -> float:
    """Microseconds of one kernel in one of `repeats` equal parts. us: of all its launches, in their order."""
    each, rest = divmod(len(us), repeats)
    if rest:
        return sum(us) / repeats
    choose = min if _BETWEEN_RANKS.search(name) else statistics.median
    return sum(choose(us[at::each]) for at in range(each))
