"""Bitwise invariance of the real armed engine along every axis, for several models and dtypes, eager and compiled."""

import pytest

from bi_patch.tools.models import families, recipes
from bi_patch.tools.verify import probes
from bi_patch.tools.verify.child import ARMED, STOCK
from bi_patch.tools.verify.probes import CROSS_PROBES, PROBES, Workload

pytestmark = pytest.mark.engine

SIZES, FEW = (1, 2, 5, 16, 64), (2, 5, 16)
# Chunks of 256 tokens, prefix caching on. The first model gets the long prompt. One more engine is the fixture `fp32`,
# another one the compiled engine of test_across_engines.
ENGINES = [
    pytest.param(recipes.QWEN3, {"max_model_len": 3200}, SIZES, 3000, id="qwen3 bf16"),
    pytest.param(recipes.LLAMA, {"eager": False}, SIZES, 0, id="llama bf16 compiled", marks=pytest.mark.slow),
    pytest.param(recipes.MOE, {}, FEW, 0, id="moe bf16"),
    pytest.param(recipes.WINDOW, {}, FEW, 0, id="sliding window bf16"),
]
# Changes that one engine has at once. Any other change has an engine of its own.
TOGETHER = (
    ("few KV blocks", "chunks of 64 tokens"),
    ("no prefix cache", "new process, empty caches", "chunks of 1000 tokens"),
)


def workload(engine, long=0, sizes=SIZES):
    return Workload.random(engine.info.vocab_size, long=long, generate=8, sizes=sizes, prefix=300)


def every_axis(name, engine, long=0, sizes=SIZES):
    assert engine.info.threads == 2 and not engine.info.open_seams
    load = workload(engine, long, sizes)
    for probe in PROBES:
        if probe.missing(engine) or (probe.measure is probes.long_prompt and not long):
            continue
        result = probe.run(engine, load)
        print(f"{name}: {result.axis}: {result.compared} compared, {result.differing} differing")
        assert result.compared > 0 and result.differing == 0, f"{result.axis}: {result.first}"


@pytest.mark.parametrize(("name", "options", "sizes", "long"), ENGINES)
def test_every_axis(start, name, options, sizes, long):
    with start(ARMED, name, **options) as engine:
        every_axis(name, engine, long, sizes)


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
    """Other chunk budgets, no prefix cache, preemption, a restart and compiled code, each against one eager engine. The
    compiled engine then measures every axis, too."""
    load = workload(bf16, 900)
    planned = [(cross, cross.collect(bf16, load), list(cross.changes(bf16))) for cross in CROSS_PROBES]
    wanted = {}
    for cross, expected, changes in planned:
        for change in changes:
            group = next((names for names in TOGETHER if change.label in names), change.label)
            wanted.setdefault(group, []).append((cross, expected, change))
    assert len(wanted) == 4, wanted.keys()
    for group in wanted.values():
        options = _given(bf16.options)
        for _, _, change in group:
            options |= change.options
        with start(ARMED, recipes.QWEN3, **options) as engine:
            for cross, expected, change in group:
                result = cross.judge(change, expected, cross.collect(engine, load, change))
                print(f"{change.label}: {result.compared} compared, {result.differing} differing")
                assert result.compared > 0 and result.differing == 0, f"{result.axis}, {change.label}: {result.first}"
            if not engine.options.eager:
                every_axis("qwen3 bf16 compiled", engine)


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
