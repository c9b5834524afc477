"""Running the matrix: every axis on every model, dtype and mode, armed, in engines of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from bi_patch.bench.evidence import InvarianceRow
from bi_patch.verify.answers import Difference
from bi_patch.verify.child import ARMED, PATIENT, ChildEngine
from bi_patch.verify.engine import Info, Options
from bi_patch.verify.probes import CROSS_PROBES, PROBES, CrossProbe, Probe, Result, Workload

LONG = 3000


def measure(label: str, options: Options, *, mode: str = ARMED, probes: Sequence[Probe] = PROBES,
            cross: Sequence[CrossProbe] = CROSS_PROBES, long: int = LONG,
            tell: Callable[[str], None] = lambda text: None) -> tuple[list[InvarianceRow], Info]:
    """One row per axis for one model and what the engine is. long: length of the long prompt.

    Raises NotExercised when an axis did not happen, and what an engine fails with: no axis is left out silently.
    """
    tell(f"{label}: starting the {mode} engine")
    rows = []
    environ = {**PATIENT, **os.environ}
    with ChildEngine(mode, options, environ=environ) as engine:
        workload = Workload.random(engine.info.vocab_size, long=long, prefix=300)
        for probe in probes:
            if probe.missing(engine):
                tell(f"{label}: {probe.name}: does not apply: {probe.missing(engine)}")
                continue
            tell(f"{label}: {probe.name}")
            rows.append(_row(label, probe.run(engine, workload)))
            tell(f"{label}: {_words(rows[-1])}")
        expected = {}
        cross = [crossing for crossing in cross if not crossing.missing(engine)]
        for crossing in cross:
            tell(f"{label}: {crossing.name}, reference")
            expected[crossing.name] = crossing.collect(engine, workload)
        changes = {crossing.name: crossing.changes(engine) for crossing in cross}
        info = engine.info
    for crossing in cross:
        total = Difference()
        for change in changes[crossing.name]:
            tell(f"{label}: {crossing.name}, {change.label}")
            with ChildEngine(mode, options.but(**change.options), environ=environ, fresh=change.fresh) as other:
                got = crossing.collect(other, workload, change)
                result = crossing.judge(change, expected[crossing.name], got)
            total += Difference(
                result.compared, result.differing, result.tokens_changed, result.largest, result.first
            )
        rows.append(InvarianceRow(label, crossing.name, total.compared, total.differing, total.first))
        tell(f"{label}: {_words(rows[-1])}")
    return rows, info


def _row(label: str, result: Result) -> InvarianceRow:
    return InvarianceRow(label, result.axis, result.compared, result.differing, result.first)


def _words(row: InvarianceRow) -> str:
    return f"{row.axis}: {row.differing} of {row.compared} differ" + (f" ({row.first})" if row.first else "")
