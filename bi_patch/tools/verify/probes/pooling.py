"""The axis of pooling models: every way of asking for a vector, beside requests that ask in another way."""

from __future__ import annotations

import random
from collections.abc import Iterator

from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.case import Case
from bi_patch.tools.verify.engine import Engine
from bi_patch.tools.verify.probes.base import Run

_SIZES = (2, 5, 16, 33)


def missing(engine: Engine) -> str:
    return "" if engine.info.pooling else "the model generates tokens and pools nothing"


def asked(engine: Engine, request: Request) -> list[tuple[str, Request]]:
    """The request in each way that the engine's task knows: (words, request)."""
    info = engine.info
    made = [("as the model says", request), ("without activation", request.but(activation=False))]
    if info.matryoshka and info.pooling in ("embed", "token_embed"):
        for length in sorted({1, info.width // 4, info.width // 2 + 1} - {0}):
            made.append((f"{length} dimensions", request.but(dimensions=length)))
        made.append((f"{length} dimensions without activation", request.but(dimensions=length, activation=False)))
    return made


def vectors(run: Run) -> Iterator[Case]:
    """Each subject in every way, in batches in which the others ask in every way."""
    load = run.workload
    fillers = [r for i in range(len(load.fillers)) for _, r in asked(run.engine, load.filler(i))]
    for index in run.subjects:
        ways = asked(run.engine, run.greedy(index))
        for size in (n for n in _SIZES if n <= run.engine.options.max_num_seqs):
            source = random.Random(100 * index + size)
            batch = [r for _, r in ways][: size - 1]
            batch += source.sample(fillers, min(size - len(batch), len(fillers)))
            if not run.holds(batch):
                continue
            source.shuffle(batch)
            labels = {r: f"{load.label(index)}, {words}, in a batch of {size}" for words, r in ways}
            yield from run.each(batch, {batch.index(r): label for r, label in labels.items() if r in batch})
    # A batch in which all ask alike takes another way through vLLM's heads than a mixed one.
    for words, request in asked(run.engine, run.greedy(len(load.subjects) - 1)):
        others = [load.filler(i, dimensions=request.dimensions, activation=request.activation) for i in range(8)]
        label = f"{load.label(len(load.subjects) - 1)}, {words}, beside 8 that ask alike"
        yield run.beside(others[:4], request, others[4:], label)
