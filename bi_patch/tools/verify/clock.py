"""How long the rest of a run of verify will take."""

from __future__ import annotations

import time

_START = 12.0  # seconds of an engine's start on a small model, until the first start was seen


class Clock:
    """Estimates the time left, from the work that is expected.

    Work is expected by name. Axes and other steps have a number of seconds for a small model; the pace of those that
    are done scales the rest. Starts of engines are shares of the first start: a large model's start says nothing of how
    long its axes take.
    """

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._steps: dict[str, float] = {}
        self._starts: dict[str, float] = {}
        self._start = 0.0
        self._done, self._spent = 1.0, 1.0

    def expect(self, step: str, seconds: float) -> None:
        """seconds: what the step takes on a small model."""
        self._steps[step] = seconds

    def expect_start(self, engine: str, share: float = 1.0) -> None:
        """share: of the time that the first start takes."""
        self._starts[engine] = share

    def finish(self, step: str, seconds: float) -> None:
        """The step took so long; 0 for a step that was left out, which says nothing of the pace."""
        expected = self._steps.pop(step, 0.0)
        if expected and seconds:
            self._done += expected
            self._spent += seconds

    def finish_start(self, engine: str, seconds: float = 0.0) -> None:
        """The engine's start took so long; 0 for an engine that is not started."""
        self._starts.pop(engine, None)
        self._start = self._start or seconds

    def start(self, share: float = 1.0) -> float:
        """Seconds that a start of this share takes."""
        return share * (self._start or _START)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.began

    @property
    def pace(self) -> float:
        """Seconds that a second of a small model takes here."""
        return self._spent / self._done

    def left(self, running: str = "", spent: float = 0.0) -> float:
        """Seconds until everything that is expected is done. running: the step that has run for `spent` seconds."""
        rest = sum(seconds for step, seconds in self._steps.items() if step != running)
        now = max(0.0, self._steps.get(running, 0.0) * self.pace - spent)
        return now + rest * self.pace + sum(map(self.start, self._starts.values()))
