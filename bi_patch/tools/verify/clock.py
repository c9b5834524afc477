"""Estimates how long the rest of a run of verify will take."""

from __future__ import annotations

import time

_START = 12.0  # seconds assumed for an engine's start until the first start is measured


class Clock:
    """Estimates the time left from the steps and engine starts that are still to come.

    Steps and starts have names. Each step, such as an axis, states its seconds on a small model; the pace of the
    finished steps scales these seconds. Starts are estimated apart, as shares of the first start, because a model that
    starts slowly need not answer slowly.
    """

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._steps: dict[str, float] = {}
        self._starts: dict[str, float] = {}
        self._start = 0.0
        self._done, self._spent = 1.0, 1.0

    def expect(self, step: str, seconds: float) -> None:
        """Add a step that is to come. seconds: the step's time on a small model."""
        self._steps[step] = seconds

    def expect_start(self, engine: str, share: float = 1.0) -> None:
        """Add an engine start that is to come. share: the start's time as a fraction of the first start's."""
        self._starts[engine] = share

    def finish(self, step: str, seconds: float) -> None:
        """Record that a step ended. seconds: the time it took, 0 for a step that was left out: the pace ignores it."""
        expected = self._steps.pop(step, 0.0)
        if expected and seconds:
            self._done += expected
            self._spent += seconds

    def finish_start(self, engine: str, seconds: float = 0.0) -> None:
        """Record that an engine started. seconds: the time it took, 0 for an engine that will not be started."""
        self._starts.pop(engine, None)
        self._start = self._start or seconds

    def start(self, share: float = 1.0) -> float:
        """The estimated seconds of a start of this share."""
        return share * (self._start or _START)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.began

    @property
    def pace(self) -> float:
        """How many seconds this model needs for the work that takes a small model one second."""
        return self._spent / self._done

    def left(self, running: str = "", spent: float = 0.0) -> float:
        """The estimated seconds until everything is done. running: the step that has run for `spent` seconds."""
        rest = sum(seconds for step, seconds in self._steps.items() if step != running)
        now = max(0.0, self._steps.get(running, 0.0) * self.pace - spent)
        return now + rest * self.pace + sum(map(self.start, self._starts.values()))
