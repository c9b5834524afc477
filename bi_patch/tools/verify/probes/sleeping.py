"""The axis "sleep and wake": an engine that gave its memory back answers as before."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from bi_patch.tools.verify.case import Case, Scenario
from bi_patch.tools.verify.engine import SERVER, Engine, Options
from bi_patch.tools.verify.probes.base import Run, pair

RELOADING = 2  # the sleep level that drops the weights


def missing(engine: Engine) -> str:
    if engine.info.platform == SERVER:
        return "verify does not put a running server to sleep"
    return "vLLM for CPU has no sleep mode" if engine.info.platform == "cpu" else ""


def options(base: Options) -> dict[str, object]:
    return {"extra": {**base.extra, "enable_sleep_mode": True}}


def sleeping(run: Run) -> Iterator[Case]:
    """Each subject after a sleep, alone and in a batch: the weights go to the host, or are dropped and loaded again.

    Random weights cannot be loaded again. The prefix cache is emptied after each wake.
    """
    load, engine = run.workload, run.engine
    requests = [run.greedy(i) for i in run.subjects]
    expected = run.alone(requests)
    fillers = [load.filler(i) for i in range(5)]
    for level in (1,) if engine.options.random_weights is not None else (1, RELOADING):
        engine.ask("sleep", msgspec.msgpack.encode(level))
        for request, known, index in zip(requests, expected, run.subjects):
            label = f"{load.label(index)} after sleep level {level}"
            alone, batch = Scenario.alone(request), Scenario.among(fillers[:2], request, fillers[2:])
            yield pair(label, alone, alone, known, run.together([request])[0])
            yield pair(f"{label}, in a batch", alone, batch, known, run.together(batch.requests)[batch.index])
