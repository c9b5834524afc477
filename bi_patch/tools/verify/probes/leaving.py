"""The axis about requests that leave early: aborted by their client, or ended by a stop string."""

from __future__ import annotations

from collections.abc import Iterator

from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.case import Case, Scenario
from bi_patch.tools.verify.engine import HITS
from bi_patch.tools.verify.probes.base import NotExercised, Run, pair
from bi_patch.tools.verify.probes.cache import needs_cache, takes_budgets

_BUDGET = 33  # tokens per engine step while a prompt is aborted: no block size is a multiple of it
_LATE = 3  # engine steps after which a client gives up a request that generates


def leaving(run: Run) -> Iterator[Case]:
    """Each subject beside requests with its prompt that are aborted or end on a stop string, and after them.

    After them, the subject reuses the prefix that they left in the cache: a whole prompt, or one that was aborted
    before its end. Raises NotExercised when no request ended on its stop string, or no prefix was reused.
    """
    engine, load = run.engine, run.workload
    block, reused, stopped = engine.info.block_size, 0, 0
    cached = [i for i in run.subjects if len(load.subjects[i]) > block and not needs_cache(engine)]
    for index in run.subjects:
        request, label = run.greedy(index), load.label(index)
        stop = _stopping(run, request)
        leave = [
            Request(request.prompt, max_tokens=_LATE + load.generate, logprobs=None, abort=_LATE),
            Request((*request.prompt, 1), max_tokens=_LATE + load.generate, logprobs=None, abort=1),
        ]
        batch = [*leave, request, stop, load.filler(index)]
        places = {2: f"{label} beside requests that leave", 3: f"{label}, ended by a stop, beside aborted requests"}
        for case in run.each(batch, places):
            stopped += len(case.got.tokens) < case.company.request.max_tokens
            yield case
        if index not in cached:
            continue
        scenarios = {
            "after requests that left": Scenario([request], warmup=[[*leave, stop]]),
            "again beside requests that leave": Scenario([*leave, stop, request], 3, warmup=[[*leave, stop]]),
        }
        if not takes_budgets(engine):
            steps = -(-(block + block // 4) // _BUDGET)
            cut = Request(request.prompt, max_tokens=load.generate, logprobs=None, abort=steps)
            scenarios["after a prompt that was aborted"] = Scenario([request], warmup=[[cut]], chunk=_BUDGET)
        (expected,) = run.alone([request])
        for words, scenario in scenarios.items():
            before = engine.counters().get(HITS, 0.0)
            got = run.scenario(scenario)
            reused += engine.counters().get(HITS, 0.0) > before
            yield pair(f"{label} {words}", Scenario.alone(request), scenario, expected, got)
    if not stopped:
        raise NotExercised("aborts and stops: no request ended on its stop string")
    if cached and not reused:
        raise NotExercised("aborts and stops: the engine's counter of cached prefix tokens did not move")


def _stopping(run: Run, request: Request) -> Request:
    """The request, ended before its last token by a piece of its own text, or by a token where no text is made."""
    (answer,) = run.alone([request])
    middle = len(answer.text) // 2
    if answer.text:
        return request.but(stop=(answer.text[max(middle - 1, 0) : middle + 1],))
    return request.but(stop_tokens=(answer.tokens[len(answer.tokens) // 2],))
