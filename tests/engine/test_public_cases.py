"""Public reports of batch variance as checks, under their vLLM issue numbers, on one armed engine.

The engine computes in fp32, where every change of an order shows in the bits. What a stock engine gives for each case
is in docs/causes.md.
"""

import random

import pytest

from bi_patch.tools.verify import probes
from bi_patch.tools.verify.answers import Request, compare

pytestmark = pytest.mark.engine

SIZE = 1900  # tokens of the vocabulary that prompts use


@pytest.fixture
def engine(fp32):
    return fp32


def prompts(seed, *lengths):
    source = random.Random(seed)
    return [tuple(source.randrange(SIZE) for _ in range(n)) for n in lengths]


def greedy(prompt, **changes):
    return Request(prompt, max_tokens=8, logprobs=3).but(**changes)


def alone(engine, requests):
    """Each request by itself, on an empty cache."""
    answers = []
    for request in requests:
        engine.reset_cache()
        answers += engine.generate([request.but(delay=0)])
    return answers


def decode_beside_prefill(engine):
    """51902, 47069: a decode beside an unrelated prefill of 9 tokens, then of 10."""
    victim, nine, ten = (greedy(p) for p in prompts(1, 1200, 9, 10))
    victim, expected = victim.but(max_tokens=12), alone(engine, [victim.but(max_tokens=12)])
    for neighbour in (nine, ten):
        engine.reset_cache()
        # One prefill joins in each step of the decode.
        batch = [victim, *(neighbour.but(delay=4 + i, max_tokens=1) for i in range(8))]
        yield from zip(expected, engine.generate(batch))


def resident_sequences(engine):
    """51187: 44 sequences at once, five times on one warm cache."""
    source = random.Random(2)
    lengths = [source.randrange(3, 300) for _ in range(44)]
    requests = [greedy(p, temperature=0.8 * (i % 2), seed=i) for i, p in enumerate(prompts(2, *lengths))]
    expected = alone(engine, requests)
    engine.reset_cache()
    for _ in range(5):
        yield from zip(expected, engine.generate(requests))


def chained_prefixes(engine):
    """52701: twelve prompts, each the beginning of the next, with a cold and then a warm cache."""
    (whole,) = prompts(3, 12 * 100)
    requests = [greedy(whole[: 100 * (i + 1)]) for i in range(12)]
    expected = alone(engine, requests)
    engine.reset_cache()
    yield from zip(expected, [engine.generate([request])[0] for request in requests])
    yield from zip(expected, engine.generate(requests))
    engine.reset_cache()
    yield from zip(expected, engine.generate(requests))


def stops_in_the_warm_up(engine):
    """5543: a warm-up batch whose requests end on stop strings, then the same prompts without stops."""
    requests = [greedy(p) for p in prompts(4, *(130 + i for i in range(8)))]
    expected = alone(engine, requests)
    engine.reset_cache()
    stopped = engine.generate([r.but(stop=(a.text[2:4],)) for r, a in zip(requests, expected)])
    assert sum(len(s.tokens) < len(a.tokens) for s, a in zip(stopped, expected)) >= 4
    yield from zip(expected, engine.generate(requests))


def seeded_beside_unseeded(engine):
    """51226: a seeded request beside unseeded requests."""
    seeded = [greedy(p, temperature=1.0, top_p=0.9, seed=5 + i) for i, p in enumerate(prompts(5, 5, 60, 200))]
    unseeded = [greedy(p, temperature=1.0) for p in prompts(6, *(7 + 11 * i for i in range(9)))]
    expected = alone(engine, seeded)
    for turn in range(3):
        engine.reset_cache()
        got = engine.generate([*unseeded[:turn], *seeded, *unseeded[turn:]])[turn:]
        yield from zip(expected, got)


def scores_of_two_prompts(engine):
    """11778: the prompt logprobs of two prompts together against each alone."""
    two = [greedy(p, max_tokens=1, prompt_logprobs=1) for p in prompts(7, 230, 410)]
    expected = alone(engine, two)
    engine.reset_cache()
    yield from zip(expected, engine.generate(two))


CASES = {
    "51902, 47069": decode_beside_prefill,
    "51187": resident_sequences,
    "52701": chained_prefixes,
    "5543": stops_in_the_warm_up,
    "51226": seeded_beside_unseeded,
    "11778": scores_of_two_prompts,
}
WARM = ("51187", "52701", "5543")  # cases about a prefix cache


@pytest.mark.parametrize("issue", CASES)
def test_public_case(engine, issue):
    compared, cached = 0, engine.counters()[probes.HITS]
    for expected, got in CASES[issue](engine):
        found = compare(expected, got)
        assert not found.differing, found.first
        compared += found.compared
    print(f"vLLM {issue}: {compared} positions")
    assert compared > 0
    if issue in WARM:
        assert engine.counters()[probes.HITS] > cached
