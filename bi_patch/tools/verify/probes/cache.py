"""Axes about how a prompt is computed: the prefix cache's contents, shared prefixes, chunks, long prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.case import Case, Scenario
from bi_patch.tools.verify.engine import HITS, SERVER, Engine
from bi_patch.tools.verify.probes.base import NotExercised, Run, pair

LONG_FROM = 640  # the smallest max_model_len in which the long prompt is longer than the subjects
_ROOM = 34  # tokens that every level leaves free behind a prompt


def needs_cache(engine: Engine) -> str:
    if engine.info.whole and not engine.info.cached:
        return "the model's prompts are computed whole, without a cache"
    if engine.info.pooling.startswith("token_"):
        return "vLLM reads no cached prefix where it returns the vectors of all tokens"
    return "" if engine.options.prefix_caching and engine.info.cached else "the engine's prefix cache is off"


def needs_blocks(engine: Engine) -> str:
    least = 2 * engine.info.block_size + 1 + _ROOM
    return (
        ""
        if engine.options.max_model_len >= least
        else (
            f"max_model_len is {engine.options.max_model_len}: no prompt fills two KV blocks of "
            f"{engine.info.block_size} tokens"
        )
    )


def needs_length(engine: Engine) -> str:
    most = engine.options.max_model_len
    return "" if most >= LONG_FROM else f"max_model_len is {most}: a long prompt needs {LONG_FROM}"


def prefix_cache(run: Run) -> Iterator[Case]:
    """Each subject with its prefix not cached, cached, cached in a batch, and with only its first blocks cached."""
    engine, load = run.engine, run.workload
    block = engine.info.block_size
    indices = [i for i, prompt in enumerate(load.subjects) if len(prompt) > 2 * block]
    if not indices or not engine.options.prefix_caching:
        raise NotExercised(f"prefix_cache needs prefix caching and a subject of over {2 * block} tokens")
    for index in indices:
        request = run.greedy(index)
        (expected,) = run.alone([request])
        alone = Scenario.alone(request)
        yield pair(f"{load.label(index)}, cold again", alone, alone, expected, run.together([request])[0])
        before = engine.counters().get(HITS, 0.0)
        warm = Scenario([request], warmup=[[request]])
        yield pair(f"{load.label(index)}, warm", alone, warm, expected, engine.generate([request])[0])
        fillers = [load.filler(i) for i in range(7)]
        batch = Scenario([*fillers[:3], request, *fillers[3:]], 3, warmup=[[request]])
        got = engine.generate(batch.requests)[3]
        yield pair(f"{load.label(index)}, warm in a batch of 8", alone, batch, expected, got)
        part = request.but(prompt=request.prompt[: block + block // 2], max_tokens=1)
        run.together([part])
        partly = Scenario([request], warmup=[[part]])
        yield pair(f"{load.label(index)}, partly warm", alone, partly, expected, engine.generate([request])[0])
        if engine.counters().get(HITS, 0.0) == before:
            raise NotExercised("prefix_cache: the engine's counter of cached prefix tokens did not move")


def shared_prefix(run: Run) -> Iterator[Case]:
    """Many requests with a long common prefix, on an empty cache and with the prefix cached."""
    load = run.workload
    if not load.prefix:
        raise NotExercised("shared_prefix: the workload has no prefix")
    count = min(12, run.engine.options.max_num_seqs)
    requests = [
        Request(
            (*load.prefix, *load.fillers[i][:20], i),
            max_tokens=load.generate,
            logprobs=3,
            digest=run.engine.options.digests,
        )
        for i in range(count)
    ]
    places = {i: f"one of {count} with {len(load.prefix)} tokens in common" for i in (0, count // 2, count - 1)}
    yield from run.each(requests, places)
    if needs_cache(run.engine):
        return
    expected = run.alone([requests[i] for i in places])
    first = Request((*load.prefix, 1), max_tokens=1)
    run.together([first])
    answers = run.engine.generate(requests)
    for (place, label), answer in zip(places.items(), expected):
        warm = Scenario(requests, place, warmup=[[first]])
        yield pair(f"{label}, cached", Scenario.alone(requests[place]), warm, answer, answers[place])


def model_here(engine: Engine) -> str:
    """Why what needs the model in this process cannot be measured: ranks that share a model are other processes."""
    kinds = ("tensor_parallel_size", "pipeline_parallel_size")
    several = any(int(engine.options.extra.get(kind, 1)) > 1 for kind in kinds)
    return "the model runs in other processes" if several else in_this_process(engine)


def in_this_process(engine: Engine) -> str:
    return "" if engine.info.platform != SERVER else "a running server's settings cannot be changed"


def takes_budgets(engine: Engine) -> str:
    """Why the budget of tokens per engine step cannot be changed, "" where it can."""
    if engine.info.whole:
        return "the model's prompts are computed whole, in one step"
    return in_this_process(engine)


def needs_processors(engine: Engine) -> str:
    return "" if engine.options.digests else "verify starts its logits processors only with --logits"


def processors(run: Run) -> Iterator[Case]:
    """The same for requests whose tokens a custom logits processor chooses, each by its place in the answer."""
    yield from chunks(run, "a custom logits processor's ", lambda index: run.greedy(index).but(first=100 + 50 * index))


def chunks(run: Run, whose: str = "", ask: Callable[[int], Request] | None = None) -> Iterator[Case]:
    """Each subject with smaller budgets of tokens per engine step, alone and beside others.

    whose: begins each label. ask: the index of a subject -> its request, None for the run's greedy requests.
    """
    engine, load = run.engine, run.workload
    whole = engine.options.chunk or engine.info.max_model_len
    for budget in (b for b in load.budgets if b < whole):
        for index in run.subjects:
            request = (ask or run.greedy)(index)
            (expected,) = run.alone([request])
            fillers = [load.filler(i) for i in range(6)]
            among = (
                Scenario.alone(request, chunk=budget),
                Scenario.among(fillers[:3], request, fillers[3:], chunk=budget),
            )
            for scenario in among:
                engine.set_chunk(budget)
                try:
                    got = run.together(scenario.requests)[scenario.index]
                finally:
                    engine.set_chunk(None)
                label = f"{whose}{load.label(index)} in chunks of {budget}, {len(scenario.requests) - 1} others"
                yield pair(label, Scenario.alone(request), scenario, expected, got)


def long_prompt(run: Run) -> Iterator[Case]:
    """A prompt of up to 3,000 tokens: its prompt logprobs and its continuation, alone and inside a batch."""
    load = run.workload
    if load.long is None:
        raise NotExercised("long_prompt: the workload has no long prompt")
    for changes in ({"prompt_logprobs": 0}, {}):
        request = Request(load.long, max_tokens=load.generate, digest=run.engine.options.digests, **changes)
        fillers = [load.filler(i) for i in range(5)]
        label = f"prompt of {len(load.long)} tokens in a batch of 6"
        yield run.beside(fillers[:4], request, fillers[4:], label)
