"""The demo's prompts, and its runs of verify on simulated engines."""

import msgspec
import pytest

from bi_patch.tools.demo import level, prompts, run
from bi_patch.tools.verify import probes, report
from bi_patch.tools.verify.child import ARMED, EngineFailed
from bi_patch.tools.verify.measure import Watcher


@pytest.fixture
def engines(arithmetic, monkeypatch):
    """engines(leak=, sampled=): engines that run.side measures in place of vLLM's. sampled: seeded requests' error."""

    def use(leak=False, sampled=None):
        class System:
            name, restarts = "arithmetic", True

            def __init__(self, model, held, *, mode, engine_args, dtype, eager):
                self.mode, self.options = mode, arithmetic().options.but(chunk=engine_args["max_num_batched_tokens"])

            def start(self, options, *, fresh=False):
                engine = arithmetic(leak=leak)
                engine.options = options
                engine.encode = lambda text: tuple(text.encode())
                answer = engine.generate

                def generate(requests):
                    if sampled is not None and any(r.temperature for r in requests):
                        raise sampled
                    return answer(requests)

                engine.generate = generate
                return engine

        monkeypatch.setattr(run, "local", System)

    return use


@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
def test_every_axis_of_the_demo_is_measured_and_its_pairs_are_kept(engines, quick):
    engines()
    found = run.side(ARMED, "none", quick=quick)
    measured = [axis.name for axis in found.report.axes if axis.state == report.PASSED]
    assert tuple(measured) == level.axes(quick)
    assert found.report.exit_code == report.INVARIANT and found.report.starts == 1
    assert sum(axis.pairs for axis in found.report.axes) == len(found.cases)
    assert {name for name in measured if len(found.of(name)) == found.axis(name).pairs} == set(measured)


def test_a_leak_is_seen_in_the_report_and_in_the_pairs(engines):
    engines(leak=True)
    found = run.side(ARMED, "none", quick=True)
    assert found.report.exit_code == report.DIFFERS
    assert sum(c.difference.differing for c in found.cases) == found.report.differing > 0
    assert msgspec.to_builtins(report.from_json(report.as_json(found.report))) == msgspec.to_builtins(found.report)


def test_an_armed_engine_that_stops_cannot_be_checked(engines):
    engines(sampled=EngineFailed("no offset"))
    found = run.side(ARMED, "none")
    assert found.report.exit_code == report.UNCHECKED
    assert found.axis("seeded sampling").state == report.FAILED and found.axis("prompt logprobs").compared > 0


def test_an_interrupt_ends_the_demo(engines):
    engines(sampled=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run.side(ARMED, "none")


def test_the_watcher_is_told_everything(engines):
    class Heard(Watcher):
        def __init__(self):
            self.settled_axes, self.pairs, self.started = [], 0, []

        def starting(self, what, left):
            self.started.append(what)

        def compared(self, case):
            self.pairs += 1

        def settled(self, axis, left):
            self.settled_axes.append(axis.name)

    engines()
    heard = Heard()
    found = run.side(ARMED, "none", quick=True, watcher=heard)
    assert heard.started and heard.pairs == len(found.cases) and set(level.axes(True)) <= set(heard.settled_axes)


def test_the_axes_exist_and_follow_the_order_of_verify():
    known = [probe.name for probe in probes.AXES]
    for quick in (True, False):
        places = [known.index(name) for name in level.axes(quick)]
        assert places == sorted(places)
    assert set(level.axes(True)) <= set(level.axes())


def test_labels_begin_with_the_name_of_one_prompt(engines):
    engines()
    names = [s.name for s in prompts.SUBJECTS]
    assert all(sum(c.label.startswith(n) for n in names) == 1 for c in run.side(ARMED, "none").cases)


def test_the_texts_are_varied_and_distinct():
    lengths = [len(s.text) for s in prompts.SUBJECTS]
    assert len(lengths) >= 4 and min(lengths) < 150 and max(lengths) > 3000
    assert min(map(len, prompts.FILLERS)) < 10 and max(map(len, prompts.FILLERS)) > 500
    assert len(set(prompts.FILLERS)) == len(prompts.FILLERS)
    assert len(prompts.FILLERS) + len(lengths) >= max(level.level().sizes)
