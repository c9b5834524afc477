"""Bitwise invariance of the real armed engine along every axis, for several models and dtypes, eager and compiled."""

import pytest

from bi_patch.tools.models import families, recipes
from bi_patch.tools.verify import probes
from bi_patch.tools.verify.child import ARMED, STOCK
from bi_patch.tools.verify.probes import CROSS_PROBES, PROBES, Workload

pytestmark = pytest.mark.engine

SIZES = (1, 2, 5, 16, 64)
# Chunks of 256 tokens, prefix caching on. The first model gets the long prompt. One more engine is the fixture `fp32`.
ENGINES = {
    "qwen3 bf16": (recipes.QWEN3, {"max_model_len": 3200}, 3000),
    "llama bf16 compiled": (recipes.LLAMA, {"eager": False}, 0),
    "moe bf16": (recipes.MOE, {}, 0),
    "sliding window bf16": (recipes.WINDOW, {}, 0),
}


def workload(engine, long=0):
    return Workload.random(engine.info.vocab_size, long=long, generate=8, sizes=SIZES, prefix=300)


def every_axis(name, engine, long=0):
    assert engine.info.threads == 2 and not engine.info.open_seams
    load = workload(engine, long)
    for probe in PROBES:
        if probe.missing(engine) or (probe.measure is probes.long_prompt and not long):
            continue
        result = probe.run(engine, load)
        print(f"{name}: {result.axis}: {result.compared} compared, {result.differing} differing")
        assert result.compared > 0 and result.differing == 0, f"{result.axis}: {result.first}"


@pytest.mark.parametrize("name", ENGINES)
def test_every_axis(start, name):
    model, options, long = ENGINES[name]
    with start(ARMED, model, **options) as engine:
        every_axis(name, engine, long)


def test_every_axis_in_fp32(fp32):
    every_axis("qwen3 fp32", fp32)


def test_a_sigmoid_of_fp32_rows(start, tmp_path):
    """The gate of shared experts is a sigmoid of one element a row: PyTorch computes the last rows by scalar code."""
    folder = families.write("Qwen2-MoE", tmp_path)
    options = {"dtype": "float32", "random_weights": 7, "tokenizer": False, "chunk": 2048}
    with start(ARMED, folder, **options) as engine:
        load = Workload.random(engine.info.vocab_size, lengths=(3, 40, 290), generate=5, sizes=(2, 17, 57))
        for probe in (p for p in PROBES if p.name in ("batch size", "chunk budget")):
            result = probe.run(engine, load)
            assert result.compared > 0 and result.differing == 0, f"{result.axis}: {result.first}"


def test_across_engines(start, bf16):
    """Other chunk budgets, no prefix cache, preemption, a restart and compiled code, each against one eager engine."""
    load = workload(bf16, 900)
    planned = [(cross, cross.collect(bf16, load), list(cross.changes(bf16))) for cross in CROSS_PROBES]
    wanted = {}
    for cross, expected, changes in planned:
        for change in changes:
            wanted.setdefault(repr(sorted(change.options.items())), []).append((cross, expected, change))
    for group in wanted.values():
        with start(ARMED, recipes.QWEN3, **{**_given(bf16.options), **group[0][2].options}) as engine:
            for cross, expected, change in group:
                result = cross.judge(change, expected, cross.collect(engine, load, change))
                print(f"{change.label}: {result.compared} compared, {result.differing} differing")
                assert result.compared > 0 and result.differing == 0, f"{result.axis}, {change.label}: {result.first}"


def _given(options):
    return {"max_model_len": options.max_model_len, "chunk": options.chunk}


def test_the_probes_see_variance_on_stock(stock):
    """On the same machine, the probes find differences in the stock engine."""
    load = workload(stock, 3000)
    differing = {p.name: p.run(stock, load).differing for p in (PROBES[0], PROBES[-1])}
    assert sum(differing.values()) > 0, differing


@pytest.mark.parametrize("name", [recipes.WINDOW, recipes.MOE])
def test_armed_computes_the_same_model_as_stock(start, name):
    """Another order rounds differently, but logprobs stay close. With a wrong mask or window they would not."""
    answers = {}
    for mode in (STOCK, ARMED):
        with start(mode, name, dtype="float32") as engine:
            load = workload(engine)
            asked = [load.greedy(i).but(prompt_logprobs=0, max_tokens=1) for i in range(len(load.subjects))]
            answers[mode] = engine.generate(asked)
    for stock, armed in zip(answers[STOCK], answers[ARMED], strict=True):
        gaps = [abs(a - b) for a, b in zip(stock.prompt_logprobs, armed.prompt_logprobs, strict=True)]
        assert max(gaps, default=0.0) < 1e-3
