"""The axis of features that people turn on together: adapters, drafts, grammars, logprobs and cached prefixes.

One engine has LoRA and n-gram speculation. Each request differs from the next in its adapter, its sampling, its
grammar and its logprobs. Where a model takes images, every third request has some.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.case import Case, Scenario
from bi_patch.tools.verify.engine import HITS, Options
from bi_patch.tools.verify.probes import adapters, images
from bi_patch.tools.verify.probes.base import NotExercised, Run, pair
from bi_patch.tools.verify.probes.crossing import ACCEPTED, DRAFTED
from bi_patch.tools.verify.probes.grammars import GRAMMARS

_LOOKUP = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
_KINDS: tuple[dict[str, object], ...] = (
    {"logprobs": 3},
    {"temperature": 0.5, "top_k": 3, "seed": 5},
    {"allowed": (11, 12, 13, 14), "logprobs": 2},
    {"prompt_logprobs": 1},
    {"temperature": 0.3, "top_p": 0.4, "seed": 6, "logprobs": 1},
    {"repetition_penalty": 1.05, "presence_penalty": 0.1, "logprobs": 3},
)
_PERIOD = 20  # tokens after which a prompt repeats itself, so that n-grams find drafts
_BUDGET = 33  # tokens per engine step


def options(base: Options) -> dict[str, object]:
    made = adapters.options(base)
    return {"digests": False, "extra": {**dict(made["extra"]), "speculative_config": _LOOKUP}}


def _requests(run: Run) -> list[Request]:
    load, folders = run.workload, ("", *adapters.adapters(run.engine))
    grammars = [json.dumps(given) for given in list(GRAMMARS.values())[:4]] if run.engine.options.tokenizer else []
    held = [] if images.missing(run.engine) else images.subjects(run.engine, load).values()
    shown = [given for request in held if request.images for given in (request.images, (), ())] or [()]
    found = []
    for i in range(2 * len(_KINDS)):
        source = (load.subjects[i % len(load.subjects)] * _PERIOD)[:_PERIOD]
        request = Request((source * 4)[: 50 + 3 * i], max_tokens=2 * load.generate, **_KINDS[i % len(_KINDS)])
        found.append(request.but(lora=folders[i % len(folders)], images=shown[i % len(shown)]))
    for i, grammar in enumerate(grammars):
        found.append(found[i].but(grammar=grammar, allowed=(), prompt_logprobs=None, lora=folders[-1 - i]))
    return found[: run.engine.options.max_num_seqs]


def together(run: Run) -> Iterator[Case]:
    """Each request beside all others: in two orders, arriving late, on the warm cache, and with a small budget."""
    asked = _requests(run)
    before = run.engine.counters()
    expected = run.alone(asked)
    for order, words in ((asked, "in order"), (asked[::-1], "in reverse order")):
        yield from run.each(order, {i: f"{_label(r)}, {words}" for i, r in enumerate(order)})
    late = [r.but(delay=2 * i) for i, r in enumerate(asked)]
    yield from run.each(late, {i: f"{_label(r)}, arriving late" for i, r in enumerate(asked)})
    warm = asked[::-1]
    answers = run.engine.generate(warm)  # on the cache that the batch before left
    for i, request in enumerate(warm):
        scenario = Scenario(warm, i, warmup=[late])
        label = f"{_label(request)}, on the warm cache"
        yield pair(label, Scenario.alone(request), scenario, expected[-1 - i], answers[i])
    run.engine.set_chunk(_BUDGET)
    try:
        answers = run.together(asked)
    finally:
        run.engine.set_chunk(None)
    for i, request in enumerate(asked):
        scenario = Scenario(asked, i, chunk=_BUDGET)
        label = f"{_label(request)}, in chunks of {_BUDGET}"
        yield pair(label, Scenario.alone(request), scenario, expected[i], answers[i])
    counted = {name: count - before.get(name, 0.0) for name, count in run.engine.counters().items()}
    drafted, accepted = counted.get(DRAFTED, 0.0), counted.get(ACCEPTED, 0.0)
    if not 0 < accepted < drafted:
        raise NotExercised(f"features together: the engine accepted {accepted:.0f} of {drafted:.0f} drafts")
    if run.engine.options.prefix_caching and not counted.get(HITS, 0.0):
        run.notes.append("no prompt was long enough for a cached prefix")


def _label(request: Request) -> str:
    parts = [
        "an adapter" if request.lora else "no adapter",
        "a grammar" if request.grammar else "",
        "sampled" if request.temperature else "greedy",
    ]
    return f"{len(request.prompt)} tokens, {', '.join(part for part in parts if part)}"
