"""The axis of a running server: many concurrent clients, each of which must get the answer that it gets alone."""

from __future__ import annotations

import random
from collections.abc import Iterator

from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.case import Case, Scenario
from bi_patch.tools.verify.engine import SERVER, Engine
from bi_patch.tools.verify.probes.base import Run, pair

_LENGTHS = (3, 5, 9, 17, 31, 40, 64, 90, 150, 257, 290, 700)
_SPREAD = 60  # steps of delay over which arrivals are spread


def offline(engine: Engine) -> str:
    return "" if engine.info.platform == SERVER else "needs a running server: give --url"


def clients(run: Run) -> Iterator[Case]:
    """Concurrent requests of mixed lengths, arrival times and samplings.

    They run on an empty cache, then in another order with their prefixes cached.
    """
    load = run.workload
    requests = asked(
        load.clients, run.engine.info.vocab_size, run.engine.options.max_model_len - load.generate - 1, load.generate
    )
    source = random.Random(3)
    batch = [r.but(delay=source.randrange(_SPREAD)) for r in requests]
    labels = {i: f"client {i} of {len(batch)}, {len(r.prompt)} tokens{_kind(r)}" for i, r in enumerate(requests)}
    yield from run.each(batch, labels)
    order = list(range(len(batch)))
    source.shuffle(order)
    again = [requests[i].but(delay=source.randrange(_SPREAD)) for i in order]
    answers = run.engine.generate(again)
    for place, index in enumerate(order):
        (expected,) = run.alone([requests[index]])
        warm = Scenario(again, place, warmup=[batch])
        yield pair(f"{labels[index]}, warm", Scenario.alone(requests[index]), warm, expected, answers[place])


def asked(count: int, vocabulary: int, longest: int, generate: int) -> list[Request]:
    """`count` different requests: in turn greedy, seeded at two temperatures, and with prompt logprobs."""
    source = random.Random(256)
    made = []
    for i in range(count):
        length = min(source.choice(_LENGTHS), longest)
        prompt = tuple(source.randrange(vocabulary - vocabulary // 16) for _ in range(length))
        request = Request(prompt, max_tokens=2 + i % max(1, generate - 1), logprobs=2)
        made.append(
            (
                request,
                request.but(temperature=0.7, top_p=0.95, seed=i),
                request.but(temperature=1.0, top_k=30, seed=i),
                request.but(prompt_logprobs=1, logprobs=0),
            )[i % 4]
        )
    return made


def _kind(request: Request) -> str:
    if request.temperature:
        return f", temperature {request.temperature}"
    return ", prompt logprobs" if request.prompt_logprobs is not None else ""
