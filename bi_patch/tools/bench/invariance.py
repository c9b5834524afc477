"""Running the matrix: every axis on every model, dtype and mode, armed, in engines of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from bi_patch.tools.evidence import InvarianceRow
from bi_patch.tools.verify.answers import Difference
from bi_patch.tools.verify.child import ARMED, PATIENT, ChildEngine
from bi_patch.tools.verify.engine import Engine, Info, Options
from bi_patch.tools.verify.probes import CROSS_PROBES, OWN_PROBES, PROBES, CrossProbe, NotExercised, Probe, Workload

LONG = 3000


def measure(
    label: str,
    options: Options,
    *,
    mode: str = ARMED,
    probes: Sequence[Probe] = PROBES,
    own: Sequence[Probe] = OWN_PROBES,
    cross: Sequence[CrossProbe] = CROSS_PROBES,
    long: int = LONG,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[list[InvarianceRow], Info]:
    """One row per axis for one model and what the engine is. long: length of the long prompt.

    probes run on one engine, each of `own` on one of its own, cross between engines.
    Raises NotExercised when an axis did not happen, and what an engine fails with: no axis is left out silently.
    """
    rows: list[InvarianceRow] = []
    environ = {**PATIENT, **os.environ}

    def applies(probe: Probe | CrossProbe, engine: Engine) -> bool:
        if why := probe.missing(engine):
            tell(f"{label}: {probe.name}: does not apply: {why}")
        return not why

    def count(axis: str, compared: int, differing: int, first: str) -> None:
        if not compared:
            raise NotExercised(f"{label}: {axis}: nothing was compared")
        rows.append(InvarianceRow(label, axis, compared, differing, first))
        tell(f"{label}: {axis}: {differing} of {compared} differ" + (f" ({first})" if first else ""))

    def within(probe: Probe, engine: Engine) -> None:
        tell(f"{label}: {probe.name}")
        result = probe.run(engine, workload)
        count(probe.name, result.compared, result.differing, result.first)

    tell(f"{label}: starting the {mode} engine")
    with ChildEngine(mode, options, environ=environ) as engine:
        workload = Workload.random(engine.info.vocab_size, long=long, prefix=300)
        for probe in probes:
            if applies(probe, engine):
                within(probe, engine)
        own = [probe for probe in own if applies(probe, engine)]
        cross = [crossing for crossing in cross if applies(crossing, engine)]
        expected = {}
        for crossing in cross:
            tell(f"{label}: {crossing.name}, reference")
            expected[crossing.name] = crossing.collect(engine, workload)
        changes = {crossing.name: crossing.changes(engine) for crossing in cross}
        info = engine.info
    for probe in own:
        tell(f"{label}: {probe.name}, starting its engine")
        with ChildEngine(mode, options.but(**probe.options(options)), environ=environ) as engine:
            within(probe, engine)
    for crossing in cross:
        total = Difference()
        for change in changes[crossing.name]:
            tell(f"{label}: {crossing.name}, {change.label}")
            with ChildEngine(mode, options.but(**change.options), environ=environ, fresh=change.fresh) as other:
                got = crossing.collect(other, workload, change)
                result = crossing.judge(change, expected[crossing.name], got)
            total += Difference(result.compared, result.differing, result.tokens_changed, result.largest, result.first)
        count(crossing.name, total.compared, total.differing, total.first)
    return rows, info
