"""Runs of verify on simulated engines: verdicts, exit codes, and the results that stay when something breaks."""

import dataclasses
import itertools
import json
import sys
from types import SimpleNamespace

import msgspec
import pytest

import bi_patch
from bi_patch.errors import UnsupportedFeature
from bi_patch.tools.verify import clock, measure, page, probes, report, terminal
from bi_patch.tools.verify.answers import Answer, Request
from bi_patch.tools.verify.case import Case, Scenario
from bi_patch.tools.verify.child import EngineFailed
from bi_patch.tools.verify.engine import Options
from bi_patch.tools.verify.levels import DEFAULT, FULL, QUICK
from bi_patch.tools.verify.measure import NoSuchAxis, Watcher, verify


@pytest.fixture
def system(arithmetic):
    """system(leak=, refuse=, break_at=): engines in place of vLLM's. refuse: option -> the error of a start with it."""

    class System:
        name, mode, restarts = "arithmetic", "armed", True

        def __init__(self, leak=False, refuse=None, break_at=None, alive=False):
            self.options = Options("none", max_model_len=4096, max_num_seqs=264)
            self.leak, self.refuse, self.break_at = leak, refuse or {}, break_at
            self.lives, self.started = alive, []
            self.error = EngineFailed("it died")
            self.change, self.info, self.imprecise = {}, {}, None

        def start(self, options, *, fresh=False):
            for name, error in self.refuse.items():
                if name in options.extra or getattr(options, name, None):
                    raise error
            engine = arithmetic(leak=self.leak)
            engine.options = options
            engine.info = msgspec.structs.replace(engine.info, **self.info)
            self.started.append((options, fresh))
            asked, answer, counted = [0], engine.generate, engine.counters
            first = len(self.started) == 1

            def generate(requests):
                asked[0] += 1
                if first and asked[0] == self.break_at:
                    raise self.error
                return [self.changed(made) for made in answer(requests)]

            engine.generate = generate
            if options.kv_blocks:
                engine.counters = lambda: counted() | {probes.PREEMPTIONS: float(asked[0])}
            engine.alive = lambda: self.lives
            if self.imprecise is not None:
                engine.ask, engine.alive = self.refused, lambda: True
            return engine

        def changed(self, made):
            values = {name: [value] * len(made.tokens) for name, value in self.change.items()}
            return msgspec.structs.replace(made, **values)

        def refused(self, do, data):
            raise self.imprecise

    return System


def test_an_invariant_engine_passes_every_axis(system):
    made = system(
        refuse={
            "enable_lora": UnsupportedFeature("no LoRA"),
            "tied": EngineFailed("no"),
            "speculative_config": EngineFailed("not here", kind="ValidationError"),
        }
    )
    found = verify(made, FULL)
    states = {axis.name: axis.state for axis in found.axes}
    assert states["LoRA"] == states["speculative decoding"] == states["concurrent clients"] == report.NOT_APPLICABLE
    assert states["eager and compiled"] == report.PASSED
    assert states["tied logits and routers"] == report.FAILED and found.exit_code == report.UNCHECKED
    rest = {name: state for name, state in states.items() if state not in (report.NOT_APPLICABLE, report.FAILED)}
    assert set(rest.values()) == {report.PASSED} and len(rest) >= 18, states
    assert any(fresh for _, fresh in made.started)


def test_quick_starts_two_engines_and_passes(system):
    made = system()
    made.options = made.options.but(eager=True)
    found = verify(made, QUICK)
    assert (found.exit_code, found.complete, found.starts) == (0, True, 2), found.verdict
    assert found.compared > 4000 and "bitwise invariant" in found.verdict[0]
    assert {a.state for a in found.axes if a.name in ("preemption", "restart")} == {report.PASSED}
    compiles = next(a for a in found.axes if a.name == "eager and compiled")
    assert compiles.state == report.LEFT_OUT and compiles.reason.endswith("the default level measures it")
    speculative = next(a for a in found.axes if a.name == "speculative decoding")
    assert speculative.reason == "not in quick: --full measures it"


def test_on_cpu_too_eager_equals_compiled_is_promised(system):
    found = verify(system(), DEFAULT, only=("eager and compiled",))
    assert found.exit_code == report.INVARIANT and found.compared > 0


def later_groups_pass(system, error):
    """A system whose first changed engine fails, and whose other engines pass."""
    made = system()
    start = made.start

    def failing(options, *, fresh=False):
        if len(made.started) == 1:
            made.started.append((options, fresh))
            raise error
        return start(options, fresh=fresh)

    made.start = failing
    return made


def test_a_failure_of_the_first_of_several_engines_stays(system):
    found = verify(later_groups_pass(system, EngineFailed("it did not start")), FULL, only=("chunked prefill",))
    axis = next(a for a in found.axes if a.name == "chunked prefill")
    assert axis.compared > 0 and axis.state == report.FAILED and "did not start" in axis.reason
    assert found.exit_code == report.UNCHECKED and not found.complete


def test_an_axis_of_which_a_part_is_refused_is_no_pass(system):
    found = verify(later_groups_pass(system, UnsupportedFeature("no chunks")), FULL, only=("chunked prefill",))
    axis = next(a for a in found.axes if a.name == "chunked prefill")
    assert axis.state == report.FAILED and "only a part" in axis.reason and "no chunks" in axis.reason


def test_a_feature_whose_engine_crashes_is_no_lack_of_it(system):
    for error in (EngineFailed("killed", kind="exit -9"), EngineFailed("no memory", kind="RuntimeError")):
        found = verify(system(refuse={"speculative_config": error}), FULL, only=("speculative decoding",))
        assert found.exit_code == report.UNCHECKED
        assert next(a for a in found.axes if a.name == "speculative decoding").state == report.FAILED


def test_an_error_that_nobody_foresaw_is_a_report(system):
    made = system(break_at=40)
    made.error = KeyError("choices")
    found = verify(made, QUICK)
    assert found.exit_code == report.UNCHECKED and not found.complete and found.compared > 0
    assert "KeyError" in found.stopped and "Traceback" in found.failure and "choices" in found.failure
    assert [a.state for a in found.axes].count(report.FAILED) == 1
    assert "Traceback" in page.page(found) and "Traceback" in terminal.plain(found)


def test_an_infinite_distance_is_no_number_of_a_float():
    assert [terminal.distance(gap) for gap in (0.0, 0.0625, sys.float_info.max)] == ["0", "6.2e-02", "inf"]


def test_logprobs_that_are_all_nan_are_no_pass(system):
    made = system()
    made.change = {"logprobs": float("nan")}
    found = verify(made, QUICK, only=("batch size",))
    axis = found.axes[0]
    assert found.exit_code == report.UNCHECKED and axis.compared == 0 and axis.undefined > 0
    assert axis.state == report.FAILED and "NaN" in axis.reason


def test_rows_of_logits_that_are_asked_for_and_missing_are_no_pass(system):
    made = system()
    made.options = made.options.but(digests=True)
    found = verify(made, QUICK, only=("batch size", "decode = prefill"))
    states = {a.name: a for a in found.axes}
    assert states["batch size"].state == report.FAILED and "rows of logits" in states["batch size"].reason
    assert states["decode = prefill"].state == report.PASSED, "a prompt's rows have no digests"
    assert "whole rows of logits are compared by digest" not in page.page(found)


def test_batches_that_the_cache_cannot_hold_are_said(system):
    made = system()
    made.info = {"kv_blocks": 200}
    axis = verify(made, QUICK, only=("batch size",)).axes[0]
    assert axis.compared > 0 and axis.state == report.NOT_EXERCISED and "no batch crossed 256 rows" in axis.reason
    made = system()
    made.info, made.options = {"kv_blocks": 80}, made.options.but(max_num_seqs=64)
    axis = verify(made, QUICK, only=("batch size",)).axes[0]
    assert axis.state == report.PASSED and "does not hold batches of 64 requests" in axis.reason


@pytest.mark.parametrize("options", [{"max_num_seqs": 1}, {"max_model_len": 512}, {"max_num_seqs": 4}], ids=str)
@pytest.mark.parametrize("level", [QUICK, DEFAULT], ids=lambda level: level.name)
def test_small_engines_can_be_invariant_too(system, options, level):
    made = system(refuse={"tied": UnsupportedFeature("arithmetic has no rows to tie")})
    made.options = made.options.but(eager=True, **options)
    made.info = {"block_size": 128}
    found = verify(made, level)
    assert found.exit_code == report.INVARIANT, found.verdict


def test_a_comparison_with_fp64_that_fails_is_told(system):
    made = system()
    made.imprecise = EngineFailed("no such op")
    found = verify(made, QUICK)
    assert found.exit_code == report.UNCHECKED and not found.complete
    assert any("not compared with fp64" in said and "no such op" in said for said in found.verdict)


def test_a_leak_is_found_kept_and_shown(system, tmp_path):
    found = verify(system(leak=True), QUICK, locate=lambda case, options, start: f"op of {case.axis}")
    assert found.exit_code == report.DIFFERS
    size = found.axes[0]
    assert size.state == report.DIFFERED and size.largest > 0 and size.ulps > 0 and size.shown and size.generated
    assert size.case.alone.request.prompt == size.case.company.request.prompt
    assert any(pair.located == "op of batch size" for pair in size.shown)
    assert "NOT batch-invariant" in found.verdict[0]
    report.write(found, tmp_path / "report.json")
    assert report.read(tmp_path / "report.json") == found
    written = json.loads((tmp_path / "report.json").read_text())
    assert next(iter(written)) == "format" and written["format"] == report.FORMAT == 1
    assert written["provenance"]["bi_patch"] == bi_patch.__version__ and written["provenance"]["digest"]
    assert written["options"]["max_num_seqs"] == 264 and written["served"] is None and written["starts"] == 2
    drawn = page.page(found)
    assert (
        drawn.count("<svg") >= 2
        and "op of batch size" in drawn
        and "<script" not in drawn
        and "http://" not in (drawn.replace("http://www.w3.org/2000/svg", ""))
    )
    assert "op of batch size" in terminal.plain(found)


def test_an_engine_that_dies_leaves_what_was_compared(system):
    found = verify(system(break_at=40), DEFAULT)
    assert found.exit_code == report.UNCHECKED and not found.complete and found.compared > 0
    assert "it died" in found.stopped and "keeps all comparisons" in found.verdict[1]
    assert [a.state for a in found.axes].count(report.FAILED) == 1
    assert page.page(found) and terminal.plain(found)


def test_of_a_run_that_compared_nothing_the_verdict_says_all(system):
    found = verify(system(break_at=1), QUICK)
    assert found.exit_code == report.UNCHECKED and found.compared == 0 and found.stopped
    said = terminal.plain(found)
    assert "nothing was compared" in said and "it died" in said
    assert "compared  differing" not in said and "left out:" not in said


def test_an_engine_that_errs_and_lives_goes_on(system):
    found = verify(system(break_at=40, alive=True), QUICK)
    assert found.exit_code == report.UNCHECKED and not found.stopped
    assert sum(a.state == report.FAILED for a in found.axes) == 1
    assert sum(a.state == report.PASSED for a in found.axes) >= 12


def test_a_difference_wins_over_a_death(system):
    found = verify(system(leak=True, break_at=40), QUICK)
    assert found.exit_code == report.DIFFERS and found.stopped


def test_an_interrupt_keeps_what_was_compared(system):
    class Impatient(Watcher):
        def settled(self, axis, left):
            if axis.name == "late arrivals":
                raise KeyboardInterrupt

    found = verify(system(), DEFAULT, watcher=Impatient())
    assert found.exit_code == report.UNCHECKED and "interrupted" in found.stopped
    assert found.verdict[0].startswith("Incomplete: the armed engine was bitwise invariant in all")
    assert found.verdict[-1] == "Stopped early: interrupted. The report keeps all comparisons made before."
    assert found.compared > 0 and found.axes[0].state == report.PASSED and found.axes[-1].state == report.LEFT_OUT


def test_an_engine_that_does_not_start(system):
    found = verify(system(refuse={"model": EngineFailed("no memory")}), QUICK)
    assert found.exit_code == report.UNCHECKED and found.compared == 0 and "no memory" in found.stopped
    assert found.verdict == [
        "Incomplete: the armed engine could not be checked: nothing was compared.",
        "Stopped early: EngineFailed: no memory.",
    ]


def test_open_seams_are_no_pass(system, arithmetic):
    made = system()
    start = made.start

    def opened(options, *, fresh=False):
        engine = start(options, fresh=fresh)
        engine.info = msgspec.structs.replace(engine.info, open_seams=("norm.x",))
        return engine

    made.start = opened
    found = verify(made, QUICK, only=("batch size",))
    assert found.exit_code == report.UNCHECKED and "norm.x" in found.verdict[-1]


def test_axes_are_chosen_by_name(system):
    found = verify(system(), QUICK, only=("long prompt", "chunked prefill"))
    assert [a.name for a in found.axes if a.compared] == ["long prompt", "chunked prefill"]
    assert found.exit_code == report.INVARIANT
    with pytest.raises(NoSuchAxis, match="batch size"):
        verify(system(), QUICK, only=("size",))


def test_a_limit_leaves_out_and_says_so(system, monkeypatch):
    ticks = itertools.count()
    for module in (measure, clock):  # each reading of the clock takes a second
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    made = system()
    made.options = made.options.but(eager=True)
    found = verify(made, dataclasses.replace(QUICK, cpu_seconds=60.0))
    assert found.compared > 0 and not found.complete and found.exit_code == report.UNCHECKED
    late = [a.name for a in found.axes if a.state == report.OUT_OF_TIME]
    assert "batch size" not in late and {"preemption", "restart"} <= set(late)
    said = next(said for said in found.verdict if "lack of time" in said)
    drawn = page.page(found)
    assert all(name in said and name in drawn for name in late) and "out of time" in drawn
    assert "the default level measures it" in said and "out of time" in terminal.plain(found)


def test_the_time_left_counts_starts_and_locate(system, monkeypatch):
    """After the axes within one engine, the time left still counts a second engine and the search for the first op."""
    now = [0.0]
    for module in (measure, clock):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    made, told = system(leak=True), []
    made.options = made.options.but(eager=True)
    start = made.start

    def slow(options, *, fresh=False):
        now[0] += 36.0 if fresh else 20.0
        return start(options, fresh=fresh)

    def locate(case, options, start):
        now[0] += 25.0
        return "an op"

    class Told(Watcher):
        def starting(self, what, left):
            told.append((now[0], left, what))

    made.start = slow
    found = verify(made, QUICK, locate=locate, watcher=Told())
    assert found.starts == 2 and len(told) == 3
    assert "one engine" in told[2][2], "both sides of the kept pair can run on one engine"
    assert (found.starting, found.locating) == (56, 25)
    own = [axis.starting for axis in found.axes if axis.starting]
    assert len(own) > 1 and len(set(own)) == 1 and sum(own) == 36, "axes that share an engine share its time"
    for at, left, what in told[1:]:
        assert 0.7 * (now[0] - at) <= left <= 1.5 * (now[0] - at), (what, left, now[0] - at)


def test_an_axis_that_was_named_is_never_dropped_for_time(system):
    level = dataclasses.replace(QUICK, cpu_seconds=0.0)
    found = verify(system(), level, only=("batch size", "prefix cache off"))
    assert found.complete and found.exit_code == report.INVARIANT


def test_the_smallest_company_is_kept():
    axis = report.Axis("a", "")
    for size in (5, 2, 9):
        company = Scenario([Request((1, 2))] * size)
        axis.add(
            Case.of("a", f"{size}", Scenario.alone(Request((1, 2))), company, Answer([1], [-1.0]), Answer([1], [-1.5]))
        )
    axis.settle()
    assert axis.case.label == "2" and axis.generated == [(0, 3)] and axis.ulps == 2**22
