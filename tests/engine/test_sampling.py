"""Sampling on the real engine: what one request asks for changes no bit of another request's scores, in any mode.

A custom logits processor sees the same steps in every chunk budget, or is refused by name.
"""

import dataclasses

import pytest

from bi_patch.errors import UnsupportedFeature
from bi_patch.tools.models import recipes
from bi_patch.tools.verify.answers import compare
from bi_patch.tools.verify.child import ARMED
from bi_patch.tools.verify.probes import PROBES, Workload, scores
from bi_patch.tools.verify.probes.base import Run

pytestmark = pytest.mark.engine

MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")


@pytest.fixture(scope="module")
def engine(start):
    with start(ARMED, recipes.QWEN3, digests=True, extra={"max_logprobs": 2048}) as made:
        yield made


@pytest.fixture(scope="module")
def work(engine):
    made = Workload.random(engine.info.vocab_size, lengths=(3, 40), generate=4)
    return dataclasses.replace(made, budgets=(16, 33))


def kinds(engine, work):
    """A request of every kind of sampling, with the scores of all tokens. Cold ones have many that underflow."""
    found = {"greedy": {}, "temperature": {}, **scores.SAMPLING, **scores._limits(engine.info.vocab_size)}
    made = {}
    for number, (kind, options) in enumerate(found.items()):
        drawn = {} if kind == "greedy" else {"temperature": 0.01, "seed": number}
        every = {"logprobs": engine.info.vocab_size}
        made[kind] = work.greedy(number % 2).but(**every, **drawn, **options)
    return made


@pytest.mark.parametrize("mode", MODES)
def test_each_kind_of_sampling_beside_every_other(engine, work, mode):
    asked = kinds(engine, work)
    run = Run(engine, work)
    engine.set_logprobs(mode)
    try:
        alone = dict(zip(asked, run.alone(list(asked.values()))))
        together = dict(zip(asked, run.together(list(asked.values()))))
        pairs = [("temperature", kind) for kind in scores.SAMPLING]
        beside = {pair: run.together([asked[kind] for kind in pair])[0] for pair in pairs}
    finally:
        engine.set_logprobs(None)
    for kind, answer in alone.items():
        found = compare(answer, together[kind], kind)
        assert found.compared == 4 and not found.differing, f"{mode}: {kind} beside all others: {found.first}"
    for (kind, other), answer in beside.items():
        assert not compare(alone[kind], answer, kind).differing, f"{mode}: {kind} beside {other}"
    cold = alone["temperature"].top[0]
    assert mode != "processed_logprobs" or sum(value < -104 for _, value in cold) > 100  # exp of these is 0 in fp32


def test_a_custom_logits_processor_over_chunk_budgets(engine, work):
    (probe,) = (p for p in PROBES if p.name == "custom logits processors")
    result = probe.run(engine, work)
    assert result.compared > 0 and result.differing == 0, result.first
    (answer,) = Run(engine, work).alone([work.greedy(1).but(first=100)])
    assert answer.tokens == [100, 101, 102, 103]


PROCESSOR = """
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

class Counter(AdapterLogitsProcessor):
    def is_argmax_invariant(self):
        return False
    def new_req_logits_processor(self, params):
        return None
"""


def test_a_processor_that_does_not_say_that_it_keeps_no_state_is_refused(refusing, user_code):
    (user_code / "my_processor.py").write_text(PROCESSOR)
    options = refusing.options.but(extra={"logits_processors": ["my_processor:Counter"]})
    with pytest.raises(UnsupportedFeature, match="plugins.logits_processors: .*my_processor.Counter.*batch_invariant"):
        refusing.refuse(options)
