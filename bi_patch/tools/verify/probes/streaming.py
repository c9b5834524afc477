"""The axis "streamed inputs": requests whose prompts come in parts."""

from __future__ import annotations

from collections.abc import Iterator

from bi_patch.platforms import releases
from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.case import Case, Scenario
from bi_patch.tools.verify.engine import SERVER, Engine
from bi_patch.tools.verify.probes.base import Run, pair

_COUNTS_LATE = "<0.32"  # such a vLLM keeps a part's last token only if asynchronous scheduling came late


def missing(engine: Engine) -> str:
    """Why an engine takes no streamed inputs, "" where it takes them."""
    given = engine.options.extra
    if engine.info.platform == SERVER:
        return "vLLM's completions over HTTP take whole prompts"
    if engine.info.mode != "armed":
        return ""
    if given.get("speculative_config"):
        return "the armed engine refuses it beside speculative decoding"
    if engine.info.two_forms:
        return "the armed engine refuses it where MLA has two forms (see BI_PATCH_MLA)"
    if releases.holds(_COUNTS_LATE, engine.info.vllm) and given.get("async_scheduling") is not False:
        return "the armed engine refuses it with asynchronous scheduling of this vLLM"
    return ""


def streaming(run: Run) -> Iterator[Case]:
    """The last part of each subject, against a request whose prompt is all that came before the answer.

    A subject comes in two parts and in three, part by part and all at once, alone and beside others. Every second
    subject is sampled with a seed.
    """
    load = run.workload
    made = [_cut(run, index) for index in run.subjects]
    for index, (two, three) in enumerate(made):
        label = load.label(index)
        yield _streamed(run, [two], 0, f"{label} in two parts")
        yield _streamed(run, [three], 0, f"{label} in three parts")
        _, other = made[(index + 1) % len(made)]
        batch = [load.filler(0), two.but(at_once=True), load.filler(1), other.but(at_once=True), load.filler(2)]
        if not run.holds(batch):
            continue
        yield _streamed(run, batch, 1, f"{label} in two parts at once, beside others")
        yield _streamed(run, [*batch[2:], three.but(delay=2)], 3, f"{label} in three parts, late, beside others")


def _streamed(run: Run, batch: list[Request], place: int, label: str) -> Case:
    whole = batch[place].but(parts=(), at_once=False, delay=0)
    (expected,) = run.alone([whole])
    got = run.together(batch)[place]
    return pair(label, Scenario.alone(whole), Scenario(batch, place), expected, got)


def _cut(run: Run, index: int) -> list[Request]:
    """A subject in two parts and in three. The prompt of each has the answers to the parts before the last."""
    request = run.greedy(index).but(digest=False)  # vLLM keeps a processor's arguments of the first part
    if index % 2:
        request = request.but(temperature=0.8, seed=300 + index)
    subject = request.prompt * -(-3 // len(request.prompt))  # a part has a token at least
    ends = [len(subject) * third // 3 for third in (1, 2, 3)]
    prompt, start, parts, made = (), 0, (), []
    for end in ends:
        prompt += subject[start:end]
        start = end
        if parts:
            made.append(request.but(prompt=prompt, parts=parts))
        (answer,) = run.alone([request.but(prompt=prompt)])
        parts += ((len(prompt), len(answer.tokens)),)
        prompt += tuple(answer.tokens[:-1])
    return made
