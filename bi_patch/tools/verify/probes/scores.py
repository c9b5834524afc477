"""Axes about the use of logits: decode against prefill, prompt logprobs, orders of requests, sampling, ties."""

from __future__ import annotations

import random
from collections.abc import Iterator

from bi_patch.tools.verify.answers import Answer, Request, same
from bi_patch.tools.verify.case import Case, Scenario
from bi_patch.tools.verify.engine import Engine
from bi_patch.tools.verify.probes.base import NotExercised, Run, pair
from bi_patch.tools.verify.probes.company import sizes

# Each kind uses another part of the sampler.
SAMPLING = {
    "top-p": {"top_p": 0.95},
    "top-k": {"top_k": 40},
    "top-p and top-k": {"top_p": 0.9, "top_k": 50},
    "min-p": {"min_p": 0.02},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.3},
}


def needs_one_form(engine: Engine) -> str:
    return "prompts and generated tokens of MLA have two forms (see BI_PATCH_MLA)" if engine.info.two_forms else ""


def decode_equals_prefill(run: Run) -> Iterator[Case]:
    """The logprobs of generated tokens against the prompt logprobs of the same tokens in a prompt."""
    for index in run.subjects:
        request = run.greedy(index).but(max_tokens=2 * run.workload.generate)
        (decoded,) = run.alone([request])
        again = Request((*request.prompt, *decoded.tokens), max_tokens=1, prompt_logprobs=0, lora=request.lora)
        (prefilled,) = run.alone([again])
        tail = prefilled.prompt_logprobs[-len(decoded.tokens) :]
        yield pair(
            f"{run.workload.label(index)}, decoded against prefilled",
            Scenario.alone(request),
            Scenario.alone(again),
            Answer(decoded.tokens, decoded.logprobs),
            Answer(decoded.tokens, tail),
            "decode",
        )


def prompt_logprobs(run: Run) -> Iterator[Case]:
    """Prompt logprobs, inside batches of each size."""
    load = run.workload
    requests = [run.greedy(i).but(prompt_logprobs=1, max_tokens=2) for i in run.subjects]
    yield from sizes(run, requests, load.score_sizes or load.sizes)


def sampled(run: Run) -> Iterator[Case]:
    """Seeded sampling, temperature 0.7 and top-p 0.95, inside batches of each size."""
    load = run.workload
    requests = [run.greedy(i).but(temperature=0.7, top_p=0.95, seed=1000 + i) for i in run.subjects]
    yield from sizes(run, requests, load.score_sizes or load.sizes)


def sampling_kinds(run: Run) -> Iterator[Case]:
    """Each kind of seeded sampling, in one batch with all other kinds and with greedy and unseeded requests."""
    load = run.workload
    batch, places = [], {}
    for number, (kind, options) in enumerate(SAMPLING.items()):
        index = number % len(load.subjects)
        places[len(batch)] = f"{load.label(index)}, {kind}, beside other samplings"
        batch.append(run.greedy(index).but(temperature=0.9, seed=50 + number, **options))
        batch.append(load.filler(number))
        batch.append(load.filler(number + 7, temperature=1.0))  # unseeded, so never compared
    yield from run.each(batch, places)


def unseeded(run: Run) -> Iterator[Case]:
    """Unseeded requests, three identical ones of each subject, in one batch: each is replayed alone with its seed.

    Raises NotExercised when the engine names no seed of an answer.
    """
    load = run.workload
    batch = [run.greedy(i).but(temperature=1.0, top_p=0.95) for i in run.subjects for _ in range(3)]
    places = range(len(batch))
    batch += [load.filler(i, temperature=float(i % 2), seed=i % 3 or None) for i in range(5)]
    answers = run.together(batch)
    if any(answers[place].seed is None for place in places):
        raise NotExercised("unseeded: the engine names no seed of an answer, so nobody can replay the answer")
    # With its seeds, the batch is the same again: the search for the first difference runs it once more.
    again = [r.but(seed=a.seed) if r.temperature else r for r, a in zip(batch, answers)]
    for place in places:
        (replayed,) = run.alone([again[place]])
        label = f"{load.label(place // 3)}, unseeded, answer {place % 3} of 3"
        yield pair(label, Scenario.alone(again[place]), Scenario(again, place), replayed, answers[place])


# vLLM's smallest temperature: the probability of most tokens underflows to 0.
_COLD = {"temperature": 0.01}
PROCESSED = "processed_logprobs"
_MANY = 20  # tokens whose logprobs a request asks for; vLLM allows no more by default


def processed_logprobs(run: Run) -> Iterator[Case]:
    """Logprobs of the logits that sampling has changed. Each kind of request runs beside all other kinds."""
    load, vocab = run.workload, run.engine.info.vocab_size
    spread = tuple(range(7, vocab, max(1, vocab // _MANY)))[:_MANY]
    kinds = {"greedy": {}, "temperature": {}, **SAMPLING, **_limits(vocab)}
    batch, labels = [], []
    for number, (kind, options) in enumerate(kinds.items()):
        index = number % len(load.subjects)
        drawn = {} if kind == "greedy" else {**_COLD, "seed": 80 + number}
        batch.append(run.greedy(index).but(asked=spread, digest=False, **drawn, **options))
        labels.append(f"{load.label(index)}, {kind}, processed logprobs beside other samplings")
    run.engine.set_logprobs(PROCESSED)
    try:
        expected = Run(run.engine, load).alone(batch)  # the run's own answers have the engine's mode
        answers = run.together(batch)
    finally:
        run.engine.set_logprobs(None)
    for place, (label, mine, other) in enumerate(zip(labels, expected, answers)):
        alone = Scenario.alone(batch[place], scores=PROCESSED)
        yield pair(label, alone, Scenario(batch, place, scores=PROCESSED), mine, other)


def _limits(vocab: int) -> dict[str, dict[str, object]]:
    """The kinds of requests that change the logits of given tokens."""
    return {
        "frequency penalty": {"frequency_penalty": 0.5},
        "logit bias": {"bias": ((5, 2.0), (9, -3.0))},
        "allowed tokens": {"allowed": tuple(range(11, min(vocab, 400)))},
    }


def logprob_orders(run: Run) -> Iterator[Case]:
    """Requests for no, few, many and prompt logprobs in one batch, in several orders.

    A further request of the batch asks for the logprobs of given tokens.
    """
    load = run.workload
    asks = (
        {"logprobs": 0},
        {"logprobs": 5},
        {"prompt_logprobs": 0, "logprobs": None},
        {"prompt_logprobs": 5},
        {"logprobs": 20},
        {"logprobs": None},
    )
    requests = [
        run.greedy(i % len(load.subjects)).but(**ask, max_tokens=2 + i % load.generate) for i, ask in enumerate(asks)
    ]
    fillers = [load.filler(i, prompt_logprobs=i % 3 if i % 2 else None, delay=i % 3) for i in range(4)]
    fillers.append(load.filler(4, asked=load.fillers[0][:3], delay=1))
    labels = {r: f"request for {_ask(ask)}" for r, ask in zip(requests, asks)}
    for seed in range(3):
        batch = [*requests, *fillers]
        random.Random(seed).shuffle(batch)
        places = {batch.index(r): f"{label}, order {seed}" for r, label in labels.items()}
        yield from run.each(batch, places)
        # Again in reverse order, on the cache that the batch filled: this shows stale buffers.
        expected = run.alone([batch[place] for place in places])
        order = batch[::-1]
        answers = run.engine.generate(order)
        for (place, label), answer in zip(places.items(), expected):
            there = len(order) - 1 - place
            again = Scenario(order, there, warmup=[batch])
            yield pair(f"{label}, again in reverse", Scenario.alone(batch[place]), again, answer, answers[there])


def _ask(ask: dict) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {'off' if v is None else v}" for k, v in ask.items())


def tied(run: Run) -> Iterator[Case]:
    """The best tokens (and a MoE router's best experts) are exact ties; the choice must not depend on the batch.

    Needs an engine with Options.tied. Raises NotExercised when no two top logprobs were the same.
    """
    ties = 0
    load = run.workload
    for case in sizes(run, [run.greedy(i).but(logprobs=20) for i in run.subjects], load.score_sizes or load.sizes):
        ties += sum(has_tie(top) for top in case.expected.top)
        yield case
    if not ties:
        raise NotExercised("tied: no two of the top 20 logprobs were the same")


def has_tie(top: list[tuple[int, float]]) -> bool:
    """Whether two tokens have bitwise the same logprob."""
    values = sorted(value for _, value in top)
    return any(same(a, b) for a, b in zip(values, values[1:]))
