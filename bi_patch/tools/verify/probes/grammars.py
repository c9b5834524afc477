"""The axis of structured output: requests with grammars, beside each other in any order and beside other requests."""

from __future__ import annotations

import json
from collections.abc import Iterator

from bi_patch.errors import BiPatchError
from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.case import Case, Scenario
from bi_patch.tools.verify.engine import Engine
from bi_patch.tools.verify.probes.base import NotExercised, Run, pair
from bi_patch.tools.verify.probes.cache import takes_budgets

_NUMBER = {"type": "integer", "minimum": 100, "maximum": 9999}


def _object(**properties: object) -> dict[str, object]:
    return {
        "json": {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    }


# vLLM's `structured_outputs`. Left to itself, vLLM serves the first and the last with the library guidance, the others
# with xgrammar.
GRAMMARS = {
    "a JSON schema with multipleOf": _object(n={**_NUMBER, "multipleOf": 7}),
    "a JSON schema": _object(n=_NUMBER, s={"enum": ["a", "bc"]}),
    "a regular expression": {"regex": "[a-f]{3,9}[0-9]+x"},
    "a choice": {"choice": ["alpha", "beta", "gamma delta"]},
    "a JSON object": {"json_object": True},
    "another JSON schema with multipleOf": _object(m={**_NUMBER, "multipleOf": 11}),
}


def needs_tokenizer(engine: Engine) -> str:
    return "" if engine.options.tokenizer else "the model has no tokenizer, which grammars need"


def structured(run: Run) -> Iterator[Case]:
    """Each kind of grammar beside all others and beside unconstrained requests.

    In two orders, with late arrivals, and with a small budget of tokens per engine step. A kind that the engine refuses
    is left out, and a note names it. Raises NotExercised if the engine refuses all kinds.
    """
    load = run.workload
    asked: dict[Request, str] = {}
    for number, (kind, given) in enumerate(GRAMMARS.items()):
        request = run.greedy(number % len(load.subjects)).but(grammar=json.dumps(given))
        try:
            run.alone([request])
        except BiPatchError as error:
            if not run.engine.alive():
                raise
            run.notes.append(f"{kind} is refused: {str(error).splitlines()[0]}")
            continue
        asked[request] = kind
    if not asked:
        raise NotExercised("structured output: the engine refuses every grammar")
    free = {run.greedy(index): "no grammar" for index in run.subjects}
    labels = {request: f"{kind} beside other grammars" for request, kind in (asked | free).items()}
    fillers = [load.filler(i) for i in range(3)]
    batch = [*asked, *fillers, *free]
    for order, said in ((batch, "in order"), (batch[::-1], "in reverse order")):
        yield from run.each(order, {i: f"{labels[r]}, {said}" for i, r in enumerate(order) if r in labels})
    late = [request.but(delay=2 * i) for i, request in enumerate(batch[::-1])]
    places = {i: f"{labels[r.but(delay=0)]}, arriving late" for i, r in enumerate(late) if r.but(delay=0) in labels}
    yield from run.each(late, places)
    if not takes_budgets(run.engine):
        yield from _in_chunks(run, batch, labels)


def _in_chunks(run: Run, batch: list[Request], labels: dict[Request, str]) -> Iterator[Case]:
    """The batch with the least budget of tokens per engine step."""
    budget = min(run.workload.budgets)
    expected = run.alone(list(labels))
    run.engine.set_chunk(budget)
    try:
        answers = run.together(batch)
    finally:
        run.engine.set_chunk(None)
    for request, answer in zip(labels, expected):
        place = batch.index(request)
        company = Scenario(batch, place, chunk=budget)
        label = f"{labels[request]}, in chunks of {budget}"
        yield pair(label, Scenario.alone(request), company, answer, answers[place])
