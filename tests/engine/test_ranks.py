"""Tensor parallelism on CPU with real ranks: equal to itself, and with fixed parts equal for every number of ranks."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bi_patch.tools.faults import ranks as faults
from bi_patch.tools.faults.child import FaultyEngine
from bi_patch.tools.models import recipes
from bi_patch.tools.parity.child import ParityEngine
from bi_patch.tools.parity.plan import NAMES, Plan
from bi_patch.tools.verify.answers import Request, compare
from bi_patch.tools.verify.child import ARMED
from bi_patch.tools.verify.probes import FEATURE_PROBES, PROBES, Change, Workload

pytestmark = pytest.mark.engine

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
AXES = ("batch size", "position and order", "prefix cache", "chunk budget")


def two_ranks(start, extra=None, model=recipes.QWEN3, **options):
    given = {"tensor_parallel_size": 2} | (extra or {})
    return start(ARMED, model, environ=ONE_THREAD, threads=1, extra=given, **options)


def invariant(engine, axes):
    load = Workload.random(engine.info.vocab_size, generate=4, sizes=(1, 2, 5, 16), prefix=130, lengths=(3, 40, 290))
    for probe in (p for p in PROBES if p.name in axes and not p.missing(engine)):
        result = probe.run(engine, load)
        assert result.compared > 0 and result.differing == 0, f"{result.axis}: {result.first}"


def test_two_ranks(start):
    """Few steps: vLLM's ranks wait for each other in busy loops, which take long where other work has the cores."""
    with two_ranks(start, {"logprobs_mode": "processed_logprobs"}, kind=ParityEngine) as engine:
        assert not engine.info.open_seams
        made = random.Random(3)
        prompts = [tuple(made.randrange(2000) for _ in range(n)) for n in (3, 40, 290, 7, 19)]
        requests = [Request(prompt, max_tokens=3, logprobs=5) for prompt in prompts]
        alone = [engine.generate([request])[0] for request in requests[:3]]
        engine.reset_cache()
        together = engine.generate(requests)
        for one, other in zip(alone, together, strict=False):
            found = compare(one, other)
            assert found.compared and not found.differing, found.first
        axis = engine.line("padded right", Plan(tokens=3))  # a trainer on one device
        assert axis.compared and not axis.differing, axis.shown


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"tensor_parallel_size": 4}], ids=["2", "4"])
def test_a_trainer_on_one_device_has_the_bits_of_several_ranks(start, extra):
    with two_ranks(start, extra | {"logprobs_mode": "processed_logprobs"}, kind=ParityEngine) as engine:
        plan = Plan(steps=2, micro=(12, 5), group=3, tokens=8, updates=1)
        axes = [engine.line(name, plan) for name in NAMES]
        assert all(axis.compared and not axis.differing for axis in axes), [a.shown or a.reason for a in axes]


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"tensor_parallel_size": 4}], ids=["2", "4"])
def test_every_axis_compiled(start, extra):
    with two_ranks(start, extra, eager=False) as engine:
        invariant(engine, {probe.name for probe in PROBES})


@pytest.mark.slow
def test_new_weights_reach_both_ranks(start):
    """An engine of two ranks that gets weights answers as one that was started with them."""
    probe = next(p for p in FEATURE_PROBES if p.name == "weight update")
    with two_ranks(start) as engine:
        assert not probe.missing(engine)
        load = Workload.random(engine.info.vocab_size, generate=8, prefix=200, lengths=(3, 40, 290))
        expected = probe.collect(engine, load)
        requests, (change,) = probe.requests(engine, load), probe.changes(engine)
    with two_ranks(start, model=change.options["model"]) as other:
        got = probe.collect(other, load, change)
        pairs = list(probe.cases(change, requests, expected, got))
    assert len(pairs) > 4 and not [case.label for case in pairs if case.differs]


def measure(program, *options):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-P", root / "benchmarks/cpu" / program, *options]
    subprocess.run(command, check=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, timeout=900)


@pytest.mark.slow
def test_data_and_pipeline_parallel_ranks_answer_as_one_engine(tmp_path):
    """Real engines of two data-parallel ranks and of two stages, against one engine; exit code 1: bits differ."""
    measure("engines.py", "--only", "ranks", "--results", tmp_path)


@pytest.mark.slow
def test_ranks_of_an_external_launcher(tmp_path):
    """Each rank makes an engine of its own, as with torchrun. Exit code 1: bits differ, or a rank failed."""
    measure("launcher.py", "tiny-qwen3 bf16 TP 2, external launcher", "--results", tmp_path)


@pytest.mark.slow
def test_other_sums_over_four_ranks_are_caught(start):
    batches = next(probe for probe in PROBES if probe.name == "batch size")
    with two_ranks(start, {"tensor_parallel_size": 4}, kind=FaultyEngine, dtype="float32") as engine:
        load = Workload.random(engine.info.vocab_size, generate=4, sizes=(1, 2, 5, 16), prefix=130, lengths=(3, 40))
        for name in ("", *faults.WAYS, ""):
            assert engine.plant_over_ranks(name) == 4
            engine.reset_cache()
            result = batches.run(engine, load)
            assert result.compared > 0 and bool(result.differing) == bool(name), (name, result)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_number_of_ranks_gives_the_same_bits(start, dtype):
    probe = next(p for p in FEATURE_PROBES if p.name == "tensor parallel size")
    environ = ONE_THREAD | {"BI_PATCH_TP_INVARIANT": "8"}
    with start(ARMED, recipes.QWEN3, environ=environ, dtype=dtype) as engine:
        load = Workload.random(engine.info.vocab_size, generate=8, lengths=(3, 40, 290))
        expected = probe.collect(engine, load)
        options, changes = engine.options, probe.changes(engine)
    assert len(changes) == 2
    for change in changes:
        given = {name: getattr(options, name) for name in ("dtype", "max_model_len", "chunk")} | change.options
        with start(ARMED, recipes.QWEN3, environ=environ, **given) as other:
            result = probe.judge(change, expected, probe.collect(other, load, change))
        assert result.compared > 0 and result.differing == 0, f"{change.label}: {result.first}"


@pytest.mark.slow
def test_parts_added_one_by_one_are_caught(start):
    """The axis "tensor parallel size" finds parts that are not added in a tree: 2 ranks then differ from 1."""
    (name,) = faults.TREES
    probe = next(p for p in FEATURE_PROBES if p.name == "tensor parallel size")
    given = {"environ": ONE_THREAD | {"BI_PATCH_TP_INVARIANT": "8"}, "kind": FaultyEngine, "dtype": "float32"}
    answers = []
    for ranks in (1, 2):
        with start(ARMED, recipes.QWEN3, extra={"tensor_parallel_size": ranks}, **given) as engine:
            assert engine.plant_over_ranks(name) == ranks
            load = Workload.random(engine.info.vocab_size, generate=4, lengths=(3, 40))
            answers.append(probe.collect(engine, load))
    result = probe.judge(Change("tensor parallel 2", {}), *answers)
    assert result.compared > 0 and result.differing > 0
