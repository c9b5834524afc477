"""The axes "pauses" and "sleep and wake": an engine that paused, or gave its memory back, answers as before."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from bi_patch.tools.verify.case import Case, Pause, Scenario
from bi_patch.tools.verify.engine import SERVER, Engine, Options
from bi_patch.tools.verify.probes.base import Run, pair

RELOADING = 2  # the sleep level that drops the weights


_PAUSED_AT = (1, 3)  # engine steps: behind the first part of a prompt, and in the middle of an answer


def pausing(run: Run) -> Iterator[Case]:
    """Each subject beside others, over a pause: running requests keep their keys and values, or lose them. Requests
    arrive during the pause.

    Every second subject is sampled with a seed. Such a subject keeps its keys and values: with asynchronous scheduling,
    an engine of model runner V1 refuses to forget them.
    """
    load = run.workload
    for index in run.subjects:
        request, drawn = run.greedy(index), index % 2
        if drawn:
            request = request.but(temperature=0.8, seed=400 + index)
        for step in _PAUSED_AT:
            late = [load.filler(2).but(delay=step + 1), load.filler(3).but(delay=step + 2)]
            batch = [load.filler(0), request, load.filler(1), *late]
            if not run.holds(batch):
                continue
            (expected,) = run.alone([request])
            for forget in (False,) if drawn else (False, True):
                company = Scenario(batch, 1, pause=Pause(step, forget))
                words = "without its keys and values" if forget else "with its keys and values"
                label = f"{load.label(index)} over a pause at step {step}, {words}"
                yield pair(label, Scenario.alone(request), company, expected, run.scenario(company))


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
