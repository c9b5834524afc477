"""The matrix: runs verify's axes on one model after the other and makes rows of evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from bi_patch.errors import BiPatchError
from bi_patch.tools.evidence import InvarianceRow
from bi_patch.tools.verify import measure as verify
from bi_patch.tools.verify.levels import Level
from bi_patch.tools.verify.probes import NotExercised
from bi_patch.tools.verify.report import FAILED, LEFT_OUT, NOT_EXERCISED, UNSETTLED, WAITING, Axis, Report


class Unmeasured(BiPatchError):
    """An axis has no result, or the run is not complete, so the matrix would have a hole."""


class _Teller(verify.Watcher):
    """Turns verify's callbacks into lines of text: what verify does, and what each axis found."""

    def __init__(self, label: str, tell: Callable[[str], None]) -> None:
        self._label, self._tell = label, tell

    def starting(self, what: str, left: float) -> None:
        self._tell(f"{self._label}: {what}")

    def measuring(self, axis: Axis, left: float) -> None:
        self._tell(f"{self._label}: {axis.name}")

    def settled(self, axis: Axis, left: float) -> None:
        if axis.compared:
            first = f" ({axis.shown[0].first})" if axis.shown else ""
            self._tell(f"{self._label}: {axis.name}: {axis.differing} of {axis.compared} differ{first}")
        elif axis.state != LEFT_OUT:
            self._tell(f"{self._label}: {axis.name}: {axis.state}: {axis.reason}")


def measure(
    label: str,
    system,
    level: Level,
    *,
    only: Sequence[str] = (),
    tell: Callable[[str], None] = lambda text: None,
    cut: bool = False,
) -> tuple[list[InvarianceRow], Report]:
    """One row for each axis of the level that applies to the system, and verify's report.

    system: the System that verify measures. only: names of axes of any level, empty for the level's axes. tell: called
    with lines about the progress. cut: whether a run that an interrupt ends counts, with the axes that were complete.
    Raises NotExercised for an axis whose cause never occurred, Unmeasured for every other axis without a result.
    Positions that differ raise nothing; their rows hold the count.
    """
    report = verify.verify(system, level, only=only, watcher=_Teller(label, tell))
    for axis in report.axes:
        if axis.state == NOT_EXERCISED:
            raise NotExercised(f"{label}: {axis.name}: {axis.reason}")
    if cut and report.stopped == verify.INTERRUPTED:
        report = complete(report)
    if holes := unmeasured(report):
        raise Unmeasured(f"{label}: {'; '.join(holes)}")
    return rows(label, report), report


def complete(report: Report) -> Report:
    """The report of an interrupted run, with its complete axes alone."""
    cut = [axis for axis in report.axes if axis.state == FAILED and axis.reason == "interrupted"]
    kept = [axis for axis in report.axes if axis not in cut and axis.state != WAITING]
    return msgspec.structs.replace(report, axes=kept, stopped="")


def rows(label: str, report: Report) -> list[InvarianceRow]:
    """A row for each axis that compared something."""
    return [
        InvarianceRow(label, axis.name, axis.compared, axis.differing, axis.shown[0].first if axis.shown else "")
        for axis in report.axes
        if axis.compared
    ]


def unmeasured(report: Report) -> list[str]:
    """What the report lacks although the level holds it, a sentence for each; empty for a complete report."""
    # A run that stopped early says so once, not for every axis that was still waiting.
    holes = [f"stopped early: {report.stopped}"] if report.stopped else []
    holes += [f"{axis.name}: {axis.state}: {axis.reason}" for axis in report.axes if axis.state in UNSETTLED[:-1]]
    if not report.stopped:
        holes += [f"{axis.name}: not run" for axis in report.axes if axis.state == UNSETTLED[-1]]
    if report.precision is not None and (report.precision.failed or report.precision.unchecked):
        holes.append(report.precision.words())
    if report.open_seams:
        holes.append(f"required patch points are open: {', '.join(report.open_seams)}")
    if not holes and not report.compared:
        holes.append("nothing was compared")
    return holes
