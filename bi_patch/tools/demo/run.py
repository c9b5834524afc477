"""Measures one engine with verify on the demo's prompts, and keeps every compared pair."""

from __future__ import annotations

from dataclasses import dataclass

from bi_patch import arming
from bi_patch.tools.demo import level
from bi_patch.tools.verify.case import Case
from bi_patch.tools.verify.local import local
from bi_patch.tools.verify.measure import INTERRUPTED, Watcher, verify
from bi_patch.tools.verify.report import Axis, Report


@dataclass(frozen=True)
class Side:
    """One engine's report, and all compared pairs in the order of measurement."""

    report: Report
    cases: tuple[Case, ...]

    def axis(self, name: str) -> Axis:
        return next(axis for axis in self.report.axes if axis.name == name)

    def of(self, name: str) -> list[Case]:
        """The pairs of one axis."""
        return [case for case in self.cases if case.axis == name]


class _Keeper(Watcher):
    """Keeps every compared pair, and passes each callback on to another watcher."""

    def __init__(self, told: Watcher) -> None:
        self.cases: list[Case] = []
        self._told = told
        self.starting, self.measuring, self.settled = told.starting, told.measuring, told.settled

    def compared(self, case: Case) -> None:
        self.cases.append(case)
        self._told.compared(case)


def side(
    mode: str, model: str, *, dtype: str = "bfloat16", quick: bool = False, watcher: Watcher | None = None
) -> Side:
    """Measure one engine, stock or armed, on a model's folder.

    An engine that does not start, or that stops, raises nothing: the report says so. Raises KeyboardInterrupt.
    """
    held, keeper = level.level(quick), _Keeper(watcher or Watcher())
    system = local(
        model,
        held,
        mode=mode,
        dtype=dtype,
        eager=True,
        engine_args={"max_num_batched_tokens": level.CHUNK, "max_num_seqs": 64},
    )
    report = verify(
        system,
        held,
        watcher=keeper,
        only=level.axes(quick),
        workload=lambda engine: level.workload(engine, quick),
    )
    if report.stopped == INTERRUPTED:
        raise KeyboardInterrupt
    return Side(report, tuple(keeper.cases))


def would_arm() -> None:
    """Arm once and disarm, so that a wrong setting, release or platform is raised before the stock engine starts."""
    if arming.state() is None and arming.arm() is not None:
        arming.disarm()
