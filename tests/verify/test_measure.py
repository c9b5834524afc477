"""Runs of verify on engines made of arithmetic: verdicts, exit codes, and what is kept when something breaks."""

import dataclasses

import msgspec
import pytest

from bi_patch.errors import UnsupportedFeature
from bi_patch.verify import page, probes, report, terminal
from bi_patch.verify.answers import Answer, Request
from bi_patch.verify.case import Case, Setting
from bi_patch.verify.child import EngineFailed
from bi_patch.verify.engine import Options
from bi_patch.verify.levels import DEFAULT, FULL, QUICK
from bi_patch.verify.measure import NoSuchAxis, Watcher, verify


@pytest.fixture
def target(arithmetic):
    """target(leak=, refuse=, break_at=): engines in place of vLLM's. refuse: option -> what starting with it raises."""

    class Target:
        name, mode, restarts = "arithmetic", "armed", True

        def __init__(self, leak=False, refuse=None, break_at=None, alive=False):
            self.options = Options("none", max_model_len=4096, max_num_seqs=264)
            self.leak, self.refuse, self.break_at = leak, refuse or {}, break_at
            self.lives, self.started = alive, []

        def start(self, options, *, fresh=False):
            for name, error in self.refuse.items():
                if name in options.extra or getattr(options, name, None):
                    raise error
            engine = arithmetic(leak=self.leak)
            engine.options = options
            self.started.append((options, fresh))
            asked, answer, counted = [0], engine.generate, engine.counters
            first = len(self.started) == 1

            def generate(requests):
                asked[0] += 1
                if first and asked[0] == self.break_at:
                    raise EngineFailed("it died")
                return answer(requests)

            engine.generate = generate
            if options.kv_blocks:
                engine.counters = lambda: counted() | {probes.PREEMPTIONS: float(asked[0])}
            engine.alive = lambda: self.lives
            return engine

    return Target


def test_an_invariant_engine_passes_every_axis(target):
    made = target(refuse={"enable_lora": UnsupportedFeature("no LoRA"), "tied": EngineFailed("no"),
                          "speculative_config": EngineFailed("not here")})  # fmt: skip
    found = verify(made, FULL)
    states = {axis.name: axis.state for axis in found.axes}
    assert states["LoRA"] == states["speculative decoding"] == states["concurrent clients"] == report.NOT_APPLICABLE
    assert states["eager and compiled"] == report.NOT_APPLICABLE
    assert states["tied logits and routers"] == report.FAILED and found.exit_code == report.UNCHECKED
    rest = {name: state for name, state in states.items() if state not in (report.NOT_APPLICABLE, report.FAILED)}
    assert set(rest.values()) == {report.PASSED} and len(rest) >= 18, states
    assert any(fresh for _, fresh in made.started)


def test_quick_starts_two_engines_and_passes(target):
    made = target()
    made.options = made.options.but(eager=True)
    found = verify(made, QUICK)
    assert (found.exit_code, found.complete, found.starts) == (0, True, 2), found.verdict
    assert found.compared > 4000 and "bitwise invariant" in found.verdict[0]
    assert {a.state for a in found.axes if a.name in ("preemption", "restart")} == {report.PASSED}
    compiles = next(a for a in found.axes if a.name == "eager and compiled")
    assert compiles.state == report.NOT_APPLICABLE and "promised" in compiles.reason
    found = verify(target(), QUICK, only=("eager and compiled",))
    assert found.exit_code == report.INVARIANT and found.compared > 0, "measured where it is named"


def test_a_leak_is_found_kept_and_shown(target, tmp_path):
    found = verify(target(leak=True), QUICK, locate=lambda case, options, mode: f"op of {case.axis} in {mode}")
    assert found.exit_code == report.DIFFERS
    size = found.axes[0]
    assert size.state == report.DIFFERED and size.largest > 0 and size.ulps > 0 and size.shown and size.generated
    assert size.case.alone.request.prompt == size.case.company.request.prompt
    assert any(pair.located == "op of batch size in armed" for pair in size.shown)
    assert "NOT batch-invariant" in found.verdict[0]
    report.write(found, tmp_path / "report.json")
    assert report.read(tmp_path / "report.json") == found
    drawn = page.page(found)
    assert drawn.count("<svg") >= 2 and "op of batch size" in drawn and "<script" not in drawn and "http://" not in (
        drawn.replace("http://www.w3.org/2000/svg", ""))
    assert "op of batch size" in terminal.plain(found)


def test_an_engine_that_dies_leaves_what_was_compared(target):
    found = verify(target(break_at=40), DEFAULT)
    assert found.exit_code == report.UNCHECKED and not found.complete and found.compared > 0
    assert "it died" in found.stopped and "kept" in found.verdict[1]
    assert [a.state for a in found.axes].count(report.FAILED) == 1
    assert page.page(found) and terminal.plain(found)


def test_an_engine_that_errs_and_lives_goes_on(target):
    found = verify(target(break_at=40, alive=True), QUICK)
    assert found.exit_code == report.UNCHECKED and not found.stopped
    assert sum(a.state == report.FAILED for a in found.axes) == 1
    assert sum(a.state == report.PASSED for a in found.axes) >= 12


def test_a_difference_wins_over_a_death(target):
    found = verify(target(leak=True, break_at=40), QUICK)
    assert found.exit_code == report.DIFFERS and found.stopped


def test_an_interrupt_keeps_what_was_compared(target):
    class Impatient(Watcher):
        def settled(self, axis, left):
            if axis.name == "late arrivals":
                raise KeyboardInterrupt

    found = verify(target(), DEFAULT, watcher=Impatient())
    assert found.exit_code == report.UNCHECKED and "interrupted" in found.stopped
    assert found.compared > 0 and found.axes[0].state == report.PASSED and found.axes[-1].state == report.LEFT_OUT


def test_an_engine_that_does_not_start(target):
    found = verify(target(refuse={"model": EngineFailed("no memory")}), QUICK)
    assert found.exit_code == report.UNCHECKED and found.compared == 0 and "no memory" in found.stopped


def test_open_seams_are_no_pass(target, arithmetic):
    made = target()
    start = made.start

    def opened(options, *, fresh=False):
        engine = start(options, fresh=fresh)
        engine.info = msgspec.structs.replace(engine.info, open_seams=("norm.x",))
        return engine

    made.start = opened
    found = verify(made, QUICK, only=("batch size",))
    assert found.exit_code == report.UNCHECKED and "norm.x" in found.verdict[-1]


def test_axes_are_chosen_by_name(target):
    found = verify(target(), QUICK, only=("long prompt", "chunked prefill"))
    assert [a.name for a in found.axes if a.compared] == ["long prompt", "chunked prefill"]
    assert found.exit_code == report.INVARIANT
    with pytest.raises(NoSuchAxis, match="batch size"):
        verify(target(), QUICK, only=("size",))


def test_a_limit_leaves_out_and_says_so(target):
    found = verify(target(), dataclasses.replace(QUICK, cpu_seconds=0.0))
    assert found.compared == 0 and found.exit_code == report.UNCHECKED
    assert all("no time left" in a.reason for a in found.axes if a.name in ("batch size", "preemption"))


def test_the_smallest_company_is_kept():
    axis = report.Axis("a", "")
    for size in (5, 2, 9):
        company = Setting([Request((1, 2))] * size)
        axis.add(Case.of("a", f"{size}", Setting.alone(Request((1, 2))), company, Answer([1], [-1.0]),
                         Answer([1], [-1.5])))  # fmt: skip
    axis.settle()
    assert axis.case.label == "2" and axis.generated == [(0, 3)] and axis.ulps == 2**22
