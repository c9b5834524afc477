"""benchmarks/hopper/bursts.py: replays of a CUDA graph in a row, and kernels of equal parts of a profile."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

HOPPER = Path(__file__).resolve().parents[4] / "benchmarks" / "hopper"


@pytest.fixture
def bursts(monkeypatch):
    monkeypatch.syspath_prepend(str(HOPPER))
    import bursts

    yield bursts
    del sys.modules["bursts"]


@pytest.fixture
def clock(monkeypatch):
    """A GPU whose every replay takes 2 ms. Returns the replays."""
    replays = []

    class Event:
        def __init__(self, **_):
            self.at = None

        def record(self):
            self.at = 2.0 * len(replays)

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph))
    return replays


def test_a_step_is_replayed_in_a_row_or_left_out(bursts, clock):
    graph = SimpleNamespace()
    step = lambda: torch.cuda.CUDAGraph.replay(graph)  # noqa: E731
    with bursts.graphs() as held:
        step()
        assert len(clock) == 1
        held.burst()
        step()
        assert held.windows == [2.0] * bursts.WINDOWS and held.count == 1
        assert len(clock) == 1 + bursts.FIRST + bursts.WINDOWS * bursts.REPLAYS
        before = len(clock)
        held.skip()
        step()
        assert len(clock) == before
    step()
    assert len(clock) == before + 1


def test_a_wait_for_another_rank_does_not_count(bursts):
    waits = [9.0, 3.0, 50.0]
    assert bursts.typical("cross_device_reduce_1stage<bf16, 2>", waits, 3) == 3.0
    assert bursts.typical("ncclDevKernel_AllGather_RING_LL", waits, 3) == 3.0
    assert bursts.typical("nvjet_tst_128x64", waits, 3) == 9.0
    # Two launches in each of three parts: of each the median.
    assert bursts.typical("silu", [1.0, 10.0, 2.0, 30.0, 3.0, 20.0], 3) == 22.0
    assert bursts.typical("sometimes", [6.0, 3.0], 3) == 3.0
