"""Times of captured calls, with a fake torch.cuda whose clock the calls advance."""

import contextlib

import pytest
import torch

from bi_patch.ops.cuda import timing


class Device:
    """A fake device with a clock in ms. A capture keeps the calls; a replay runs them and advances the clock."""

    def __init__(self):
        self.now, self.capturing, self.log = 0.0, None, []

    def work(self, name, ms):
        def call():
            if self.capturing is not None:
                self.capturing.append((name, ms))
            else:
                self.run(name, ms)

        return call

    def run(self, name, ms):
        self.log.append(name)
        self.now += ms


@pytest.fixture
def device(monkeypatch):
    device = Device()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            assert device.capturing is None
            self.at = device.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    class Graph:
        def capture_begin(self, capture_error_mode):
            self.calls = device.capturing = []

        def capture_end(self):
            device.capturing = None

        def replay(self):
            assert device.capturing is None
            for name, ms in self.calls:
                device.run(name, ms)

    for name, value in {
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": object,
        "synchronize": lambda: device.log.append("wait"),
        "stream": lambda _: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    timing._stream.cache_clear()
    yield device
    timing._stream.cache_clear()


def test_ways_are_captured_once_and_replayed_in_turns_without_a_wait(device):
    one, other = device.work("a", 2.0), device.work("b", 3.0)
    assert timing.microseconds([[one, one], [other]], 2) == [2000, 3000]
    assert device.log == ["a", "b", "wait", "a", "a", "b", "a", "a", "b", "wait"]


def test_another_process_disturbs_some_replays(device):
    durations = {"a": iter((9.0, 1.0, 6.0, 9.0, 1.01)), "b": iter((1.0,) * 5)}
    run = device.run
    device.run = lambda name, ms: run(name, next(durations[name]))
    assert timing.microseconds([[device.work("a", 1.0)], [device.work("b", 1.0)]], 2) == [1000, 1000]
    assert not [left for left in durations.values() if next(left, None)]  # the times agree after two batches


def test_replays_that_never_agree_end(device):
    grown = iter(range(1, 100))
    run = device.run
    device.run = lambda name, ms: run(name, 2.0 ** next(grown))
    assert timing.microseconds([[device.work("a", 1.0)]], 2) == [4000]
    assert device.log.count("a") == 1 + 2 * timing._BATCHES


def test_one_call_is_timed_after_one_that_loads_its_kernel(device):
    durations = iter((50.0, 2.0, 9.0, 3.0))
    assert timing.once(lambda: device.run("a", next(durations))) == 2000


def test_a_call_that_fails_in_a_capture_ends_the_capture(device):
    def fails():
        if device.capturing is not None:
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        timing.microseconds([[fails]])
    assert device.capturing is None
