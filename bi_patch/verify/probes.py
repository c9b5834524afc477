"""The axes of the invariance matrix: one probe per axis, each run on live engines and counted bitwise.

A Probe compares answers within one engine. A CrossProbe asks the same of engines started differently (chunk budget,
cache, KV size, a new process) and compares them. Both take a Workload, so that any model and device can be probed:

    workload = Workload.random(engine.info.vocab_size)
    for probe in PROBES:
        result = probe.run(engine, workload)        # Result: axis, compared, differing, first
    for cross in CROSS_PROBES:
        expected = cross.collect(engine, workload)   # engine: the base options
        for change in cross.changes(engine):
            got = cross.collect(other_engine, workload)   # an engine of engine.options.but(**change.options)
            result = cross.judge(change, expected, got)

A probe that could not do what it is for (no preemption happened, no prefix was cached) raises NotExercised.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from bi_patch.errors import BiPatchError
from bi_patch.verify.answers import Answer, Difference, Request, compare, compare_all
from bi_patch.verify.engine import Engine

HITS, PREEMPTIONS = "vllm:prefix_cache_hits", "vllm:num_preemptions"


class NotExercised(BiPatchError):
    """A probe ran but its cause never occurred, so its result would prove nothing."""


class Result(msgspec.Struct, frozen=True):
    """One axis on one engine: positions compared bitwise, how many differ, and words for the first one."""

    axis: str
    compared: int
    differing: int
    tokens_changed: int
    largest: float
    first: str

    @staticmethod
    def of(axis: str, difference: Difference) -> Result:
        d = difference
        return Result(axis, d.compared, d.differing, d.tokens_changed, d.largest, d.first)


@dataclass(frozen=True)
class Workload:
    """subjects: prompts whose answers are compared; fillers: what runs beside them; all token ids.

    long: one prompt of up to 3,000 tokens, or None where max_model_len is too small for it.
    generate: tokens generated per request. sizes: numbers of concurrent requests.
    """

    subjects: tuple[tuple[int, ...], ...]
    fillers: tuple[tuple[int, ...], ...]
    long: tuple[int, ...] | None = None
    generate: int = 12
    sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 8, 13, 16, 17, 32, 33, 64)
    labels: tuple[str, ...] = field(default=())

    @staticmethod
    def random(vocab_size: int, *, long: int = 0, seed: int = 1, lengths: Sequence[int] = (3, 37, 150, 411),
               fillers: int = 63, generate: int = 12) -> Workload:
        """Prompts of random tokens, the same for the same arguments. long: its length, 0 for none."""
        source = random.Random(seed)

        def prompt(length: int) -> tuple[int, ...]:
            return tuple(source.randrange(vocab_size - vocab_size // 16) for _ in range(length))

        return Workload(
            subjects=tuple(prompt(n) for n in lengths),
            fillers=tuple(prompt(source.choice((2, 5, 9, 17, 33, 64, 120, 257))) for _ in range(fillers)),
            long=prompt(long) if long else None,
            generate=generate,
        )

    def label(self, index: int) -> str:
        return self.labels[index] if index < len(self.labels) else f"prompt of {len(self.subjects[index])} tokens"

    def greedy(self, index: int) -> Request:
        return Request(self.subjects[index], max_tokens=self.generate, logprobs=3)

    def filler(self, index: int, **changes: object) -> Request:
        return Request(self.fillers[index % len(self.fillers)], max_tokens=self.generate).but(**changes)


@dataclass(frozen=True)
class Probe:
    """One axis within one engine. run(engine, workload) may raise NotExercised."""

    name: str
    about: str
    measure: Callable[[Engine, Workload], Difference]
    causes: tuple[int, ...] = ()

    def run(self, engine: Engine, workload: Workload) -> Result:
        return Result.of(self.name, self.measure(engine, workload))


@dataclass(frozen=True)
class Change:
    """options: what differs from the base engine's options ({} = the same, in a new process)."""

    label: str
    options: dict[str, object]


@dataclass(frozen=True)
class CrossProbe:
    """One axis across engines: `collect` runs on the base engine and on one engine per change."""

    name: str
    about: str
    changes: Callable[[Engine], Sequence[Change]]
    requests: Callable[[Engine, Workload], list[Request]]
    check: Callable[[Change, dict[str, float]], None] = lambda change, counted: None
    causes: tuple[int, ...] = ()

    def collect(self, engine: Engine, workload: Workload, change: Change | None = None) -> list[Answer]:
        """The answers of one engine, cold. change: what this engine changed, None for the base engine."""
        engine.reset_cache()
        before = engine.counters()
        answers = engine.generate(self.requests(engine, workload))
        if change is not None:
            self.check(change, {k: v - before.get(k, 0.0) for k, v in engine.counters().items()})
        return answers

    def judge(self, change: Change, expected: Sequence[Answer], got: Sequence[Answer]) -> Result:
        labels = [f"{change.label}: request {i}" for i in range(len(expected))]
        return Result.of(self.name, compare_all(expected, got, labels))


def alone(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """Each request by itself on a cold cache: the reference of every axis."""
    answers = []
    for request in requests:
        engine.reset_cache()
        answers += engine.generate([request.but(delay=0)])
    return answers


def beside(engine: Engine, expected: Answer, request: Request, before: Sequence[Request],
           after: Sequence[Request], label: str) -> Difference:
    """Run `request` between others, on a cold cache, and compare it with its answer alone."""
    engine.reset_cache()
    got = engine.generate([*before, request, *after])[len(before)]
    return compare(expected, got, label)


def batch_size(engine: Engine, workload: Workload) -> Difference:
    """Every subject inside batches of each size; where the batch has room all subjects share it."""
    return _sizes(engine, workload, [workload.greedy(i) for i in range(len(workload.subjects))])


def sampled(engine: Engine, workload: Workload) -> Difference:
    """Seeded sampling, temperature 0.7 and top-p 0.95, inside batches of each size."""
    requests = [
        workload.greedy(i).but(temperature=0.7, top_p=0.95, seed=1000 + i) for i in range(len(workload.subjects))
    ]
    return _sizes(engine, workload, requests)


def prompt_logprobs(engine: Engine, workload: Workload) -> Difference:
    """Logprobs of the prompt itself, inside batches of each size."""
    requests = [workload.greedy(i).but(prompt_logprobs=1, max_tokens=2) for i in range(len(workload.subjects))]
    return _sizes(engine, workload, requests)


def _sizes(engine: Engine, workload: Workload, requests: list[Request]) -> Difference:
    expected = alone(engine, requests)
    total = Difference()
    for size in workload.sizes:
        if size > engine.options.max_num_seqs:
            continue
        groups = [requests] if size >= len(requests) else [[r] for r in requests]
        for group in groups:
            batch = [*group, *(workload.filler(i) for i in range(size - len(group)))]
            random.Random(size).shuffle(batch)
            engine.reset_cache()
            answers = engine.generate(batch)
            for request in group:
                index = requests.index(request)
                got = answers[batch.index(request)]
                total += compare(expected[index], got, f"{workload.label(index)} in a batch of {size}")
    return total


def position(engine: Engine, workload: Workload) -> Difference:
    """Every subject first, in the middle and last of nine, and with the others in reverse order."""
    fillers = [workload.filler(i) for i in range(8)]
    total = Difference()
    for index in range(len(workload.subjects)):
        request = workload.greedy(index)
        (expected,) = alone(engine, [request])
        for place in (0, 4, 8):
            for order in (fillers, fillers[::-1]):
                label = f"{workload.label(index)} at place {place} of 9"
                total += beside(engine, expected, request, order[:place], order[place:], label)
    return total


def arrivals(engine: Engine, workload: Workload) -> Difference:
    """Requests that join and leave a running batch at different engine steps."""
    requests = [workload.greedy(i) for i in range(len(workload.subjects))]
    expected = alone(engine, requests)
    total = Difference()
    for spread in (1, 3):
        batch = [
            *(workload.filler(i, delay=i % 5 * spread, max_tokens=2 + i % workload.generate) for i in range(12)),
            *(request.but(delay=1 + i * spread) for i, request in enumerate(requests)),
        ]
        engine.reset_cache()
        got = engine.generate(batch)[12:]
        total += compare_all(expected, got, [f"{workload.label(i)} joining late" for i in range(len(requests))])
    return total


def mixed_lengths(engine: Engine, workload: Workload) -> Difference:
    """Every subject beside many of the shortest fillers, and beside several of the longest."""
    fillers = sorted((workload.filler(i) for i in range(len(workload.fillers))), key=lambda r: len(r.prompt))
    total = Difference()
    for index in range(len(workload.subjects)):
        request = workload.greedy(index)
        (expected,) = alone(engine, [request])
        for others, kind in ((fillers[:24], "24 short"), (fillers[-6:], "6 long")):
            half = len(others) // 2
            label = f"{workload.label(index)} beside {kind} prompts"
            total += beside(engine, expected, request, others[:half], others[half:], label)
    return total


def prefix_cache(engine: Engine, workload: Workload) -> Difference:
    """Cold, warm, and partly warm (only the first blocks cached) alone, then warm inside a batch."""
    block = engine.info.block_size
    indices = [i for i, prompt in enumerate(workload.subjects) if len(prompt) > 2 * block]
    if not indices or not engine.options.prefix_caching:
        raise NotExercised(f"prefix_cache needs prefix caching and a subject of over {2 * block} tokens")
    total = Difference()
    for index in indices:
        request = workload.greedy(index)
        (expected,) = alone(engine, [request])
        before = engine.counters().get(HITS, 0.0)
        total += compare(expected, engine.generate([request])[0], f"{workload.label(index)}, warm")
        fillers = [workload.filler(i) for i in range(7)]
        batched = engine.generate([*fillers[:3], request, *fillers[3:]])[3]
        total += compare(expected, batched, f"{workload.label(index)}, warm in a batch of 8")
        engine.reset_cache()
        engine.generate([request.but(prompt=request.prompt[: block + block // 2], max_tokens=1)])
        total += compare(expected, engine.generate([request])[0], f"{workload.label(index)}, partly warm")
        if engine.counters().get(HITS, 0.0) == before:
            raise NotExercised("prefix_cache: the engine's counter of cached prefix tokens did not move")
    return total


def decode_equals_prefill(engine: Engine, workload: Workload) -> Difference:
    """Logprobs of generated tokens, against those of the same tokens given back as a prompt."""
    total = Difference()
    for index in range(len(workload.subjects)):
        request = workload.greedy(index).but(max_tokens=2 * workload.generate)
        (decoded,) = alone(engine, [request])
        again = Request((*request.prompt, *decoded.tokens), max_tokens=1, prompt_logprobs=0)
        (prefilled,) = alone(engine, [again])
        tail = prefilled.prompt_logprobs[-len(decoded.tokens):]
        total += compare(
            Answer(decoded.tokens, decoded.logprobs),
            Answer(decoded.tokens, tail),
            f"{workload.label(index)}, decoded against prefilled",
        )
    return total


def long_prompt(engine: Engine, workload: Workload) -> Difference:
    """A prompt of thousands of tokens: prompt logprobs and continuation, alone against inside a batch."""
    if workload.long is None:
        raise NotExercised("long_prompt: the workload has no long prompt")
    total = Difference()
    for changes in ({"prompt_logprobs": 0}, {}):
        request = Request(workload.long, max_tokens=workload.generate, **changes)
        (expected,) = alone(engine, [request])
        fillers = [workload.filler(i) for i in range(5)]
        label = f"prompt of {len(workload.long)} tokens in a batch of 6"
        total += beside(engine, expected, request, fillers[:4], fillers[4:], label)
    return total


PROBES = (
    Probe("batch size", "1 to 64 concurrent greedy requests", batch_size, (1, 2, 3, 10, 19)),
    Probe("position and order", "place in a batch of nine, others reversed", position, (8,)),
    Probe("late arrivals", "requests join and leave a running batch", arrivals, (20,)),
    Probe("mixed lengths", "one long beside many short, and the reverse", mixed_lengths, (3, 4)),
    Probe("prefix cache", "cold, warm, partly warm", prefix_cache, (6, 7)),
    Probe("decode = prefill", "decode logprobs against prompt logprobs", decode_equals_prefill, (1, 2, 3)),
    Probe("prompt logprobs", "logprobs of the prompt in each batch size", prompt_logprobs, (2, 8)),
    Probe("seeded sampling", "temperature 0.7, top-p 0.95", sampled, (21,)),
    Probe("long prompt", "up to 3,000 tokens, alone and in a batch", long_prompt, (3, 4)),
)


def _everything(engine: Engine, workload: Workload) -> list[Request]:
    """Every subject greedy, sampled and with prompt logprobs, and the long prompt, in one batch."""
    subjects = range(len(workload.subjects))
    requests = [workload.greedy(i) for i in subjects]
    requests += [workload.greedy(i).but(temperature=0.7, top_p=0.95, seed=i) for i in subjects]
    requests += [workload.greedy(i).but(prompt_logprobs=0) for i in subjects]
    if workload.long is not None:
        requests.append(Request(workload.long, max_tokens=workload.generate, prompt_logprobs=0))
    return requests


def _chunks(engine: Engine) -> list[Change]:
    whole = engine.options.max_model_len
    budgets = [b for b in (64, 256, 1000) if b != engine.options.chunk]
    return [
        *(Change(f"chunks of {b} tokens", {"chunk": b, "max_num_seqs": min(64, b)}) for b in budgets),
        Change("chunked prefill off", {"chunk": whole, "chunked": False}),
    ]


def _blocks_for_one(engine: Engine) -> int:
    """The smallest KV cache that still holds one request of max_model_len (one block is vLLM's null block)."""
    return -(-engine.options.max_model_len // engine.info.block_size) + 1


def _crossing(engine: Engine, workload: Workload) -> list[Request]:
    """Requests that each need one more KV block soon after their prompt: together more than a small cache has."""
    block = engine.info.block_size
    source = random.Random(7)
    count = min(_blocks_for_one(engine) + 4, engine.options.max_num_seqs)
    limit = engine.info.vocab_size - engine.info.vocab_size // 16
    return [
        Request(tuple(source.randrange(limit) for _ in range(block - 4 - i % 3)), max_tokens=16, logprobs=3)
        for i in range(count)
    ]


def _preempted(change: Change, counted: dict[str, float]) -> None:
    if counted.get(PREEMPTIONS, 0.0) <= 0:
        raise NotExercised("preemption: the engine's counter of preemptions did not move; give it fewer KV blocks")


CROSS_PROBES = (
    CrossProbe("chunked prefill", "several chunk budgets, and off", _chunks, _everything, causes=(6,)),
    CrossProbe(
        "prefix cache off", "against on",
        lambda engine: [Change("no prefix cache", {"prefix_caching": False})], _everything, causes=(6, 7),
    ),
    CrossProbe(
        "preemption", "a KV cache too small for the batch; counted by the engine",
        lambda engine: [Change("few KV blocks", {"kv_blocks": _blocks_for_one(engine)})],
        _crossing, _preempted, causes=(9,),
    ),
    CrossProbe("restart", "a new process", lambda engine: [Change("new process", {})], _everything, causes=(18,)),
)
