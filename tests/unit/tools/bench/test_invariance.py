"""The matrix runs verify: every axis gives a row, and an axis without a result stops the run with an error."""

import msgspec
import pytest

from bi_patch.tools.bench import invariance
from bi_patch.tools.bench.matrix import INVARIANCE, LEVEL
from bi_patch.tools.verify import probes, report
from bi_patch.tools.verify.child import EngineFailed
from bi_patch.tools.verify.engine import Options
from bi_patch.tools.verify.levels import FULL
from bi_patch.tools.verify.probes import NotExercised


@pytest.fixture
def system(arithmetic):
    """system(leak=, change=): simulated engines. change: a function that is applied to each engine after its start."""

    class System:
        name, mode, restarts = "arithmetic", "armed", True

        def __init__(self, leak=False, change=lambda engine, options: None):
            self.options = Options("none", max_model_len=4096, max_num_seqs=264)
            self.leak, self.change = leak, change

        def start(self, options, *, fresh=False):
            engine = arithmetic(leak=self.leak)
            engine.options = options
            counted = engine.counters
            if options.kv_blocks:
                engine.counters = lambda: counted() | {probes.PREEMPTIONS: float(len(engine.warm))}
            self.change(engine, options)
            return engine

    return System


def measure(system, **options):
    told = []
    rows, found = invariance.measure("m", system, FULL, tell=told.append, **options)
    return rows, found, told


# Custom logits processors need an engine that digests logits, pooled vectors an engine that pools, images a model.
OTHERS = ("custom logits processors", "pooled vectors", "images")
WITHIN = tuple(probe.name for probe in probes.PROBES if probe.name not in OTHERS)
ASKED = (*WITHIN, *(probe.name for probe in probes.CROSS_PROBES), "concurrent clients", "tensor parallel size")


def test_every_axis_that_applies_is_a_row(system):
    rows, found, told = measure(system(), only=ASKED)
    states = {axis.name: axis.state for axis in found.axes if axis.name in ASKED}
    measured = {name for name, state in states.items() if state == report.PASSED}
    assert {row.axis for row in rows} == measured and measured > set(WITHIN)
    assert set(states.values()) == {report.PASSED, report.NOT_APPLICABLE}
    assert all(row.model == "m" and row.compared and not row.differing for row in rows)
    assert any(text.startswith("m: restart: 0 of ") for text in told)
    assert any(text.startswith("m: tensor parallel size: not applicable: ") for text in told)


def test_named_axes_alone_start_one_engine(system):
    rows, found, _ = measure(system(), only=WITHIN)
    assert tuple(row.axis for row in rows) == WITHIN and found.starts == 1


def test_positions_that_differ_are_rows_and_no_error(system):
    rows, _, told = measure(system(leak=True), only=("batch size",))
    assert [row.axis for row in rows] == ["batch size"] and rows[0].differing and "generated position" in rows[0].first
    assert any(rows[0].first in text for text in told)


def test_an_axis_that_did_not_happen_stops_the_run(system):
    def never_cached(engine, options):
        engine.counters = lambda: {probes.HITS: 0.0, probes.PREEMPTIONS: 0.0}

    with pytest.raises(NotExercised, match="m: prefix cache: "):
        measure(system(change=never_cached), only=("prefix cache",))


def test_an_engine_that_fails_stops_the_run(system):
    def broken(engine, options):
        if options.tied:
            raise EngineFailed("it died")

    with pytest.raises(invariance.Unmeasured, match="m: tied logits and routers: failed: EngineFailed: it died"):
        measure(system(change=broken), only=("batch size", "tied logits and routers"))

    def dead(engine, options):
        raise EngineFailed("it died")

    with pytest.raises(invariance.Unmeasured, match="m: stopped early: EngineFailed: it died"):
        measure(system(change=dead))


def test_a_run_that_is_cut_counts_with_its_complete_axes_if_asked(system):
    def cut(engine, options):
        if options.tied:
            raise KeyboardInterrupt

    asked = {"only": ("batch size", "tied logits and routers")}
    rows, found, _ = measure(system(change=cut), cut=True, **asked)
    assert [row.axis for row in rows] == ["batch size"] and "batch size" in {axis.name for axis in found.axes}
    with pytest.raises(invariance.Unmeasured, match="m: stopped early: interrupted"):
        measure(system(change=cut), **asked)

    def at_once(engine, options):
        raise KeyboardInterrupt

    with pytest.raises(invariance.Unmeasured, match="m: nothing was compared"):
        measure(system(change=at_once), cut=True, **asked)


def test_open_seams_and_inaccurate_products_stop_the_run(system):
    def open_seam(engine, options):
        engine.info = msgspec.structs.replace(engine.info, open_seams=("norm.rms",))

    with pytest.raises(invariance.Unmeasured, match="required patch points are open: norm.rms"):
        measure(system(change=open_seam), only=("batch size",))


def test_a_spec_without_cross_has_the_axes_of_one_engine():
    assert {spec.axes for spec in INVARIANCE if not spec.cross} == {tuple(probe.name for probe in probes.PROBES)}
    assert {spec.axes for spec in INVARIANCE if spec.cross} == {()} and LEVEL is FULL
