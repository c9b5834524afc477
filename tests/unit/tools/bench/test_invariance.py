"""The matrix counts every axis, in engines of its own where it needs them, and nothing compared is no pass."""

import pytest

from bi_patch.tools.bench import invariance
from bi_patch.tools.verify.engine import Options
from bi_patch.tools.verify.probes import Change, CrossProbe, NotExercised, Probe


def pairs(run):
    """One request alone and beside another."""
    request, other = run.greedy(0), run.greedy(1)
    yield run.beside([other], request, [], "beside one")


def greedy(engine, workload):
    return [workload.greedy(0), workload.greedy(1)]


@pytest.fixture
def started(monkeypatch, arithmetic):
    """The options of each engine that was started, in order."""
    options = []

    def start(mode, given, **kwargs):
        options.append(given)
        return arithmetic()

    monkeypatch.setattr(invariance, "ChildEngine", start)
    return options


def measure(**axes):
    told = []
    axes = {"probes": (), "own": (), "cross": ()} | axes
    rows, _ = invariance.measure("m", Options("none"), long=0, tell=told.append, **axes)
    return [(row.axis, row.compared > 0, row.differing) for row in rows], told


def test_every_kind_of_axis_is_a_row(started):
    own = Probe("own", "", pairs, options=lambda base: {"tied": True})
    cross = CrossProbe("cross", "", lambda engine: [Change("compiled", {"eager": False})], greedy)
    rows, told = measure(probes=[Probe("plain", "", pairs)], own=[own], cross=[cross])
    assert rows == [("plain", True, 0), ("own", True, 0), ("cross", True, 0)]
    assert [(o.tied, o.eager) for o in started] == [(False, True), (True, True), (False, False)]
    assert any(text.startswith("m: cross: 0 of ") for text in told)


def test_an_axis_that_does_not_apply_is_told(started):
    told = measure(cross=[CrossProbe("cross", "", lambda e: [], greedy, missing=lambda e: "one device")])[1]
    assert "m: cross: does not apply: one device" in told


@pytest.mark.parametrize(
    "axes",
    [
        {"probes": [Probe("empty", "", lambda run: iter(()))]},
        {"cross": [CrossProbe("empty", "", lambda engine: [], greedy)]},
    ],
)
def test_nothing_compared_is_no_pass(started, axes):
    with pytest.raises(NotExercised, match="empty: nothing was compared"):
        measure(**axes)
