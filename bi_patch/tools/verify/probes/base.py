"""Defines probes (within one engine, and across engines), their prompts, and how they query an engine."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from bi_patch.errors import BiPatchError
from bi_patch.tools.verify.answers import Answer, Difference, Request
from bi_patch.tools.verify.case import Case, Scenario
from bi_patch.tools.verify.engine import Engine, Options


class NotExercised(BiPatchError):
    """A probe ran but its cause never occurred, so its result would prove nothing."""


def config(model: str) -> dict:
    """A local folder's config.json; empty for a model's name, and for a folder without the file."""
    path = Path(model).expanduser() / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


class Result(msgspec.Struct, frozen=True):
    """One axis on one engine: positions compared bitwise, how many differ, and a description of the first of them."""

    axis: str
    compared: int
    differing: int
    tokens_changed: int
    largest: float
    first: str

    @staticmethod
    def of(axis: str, cases: Iterable[Case]) -> Result:
        d = sum((case.difference for case in cases), start=Difference())
        return Result(axis, d.compared, d.differing, d.tokens_changed, d.largest, d.first)


@dataclass(frozen=True)
class Workload:
    """The prompts of the probes, as token ids.

    subjects: prompts whose answers are compared. fillers: prompts that run beside the subjects.
    long: a prompt of up to 3,000 tokens, None where max_model_len is too small.
    generate: tokens generated per request. sizes: numbers of concurrent requests. prefix: tokens that requests of the
    shared-prefix axis have in common. clients: concurrent requests to a server. score_sizes: numbers of concurrent
    requests for prompt logprobs and sampling, empty for `sizes`. places: positions of a subject in a batch of nine.
    budgets: tokens per engine step; only budgets below the engine's own are used.
    """

    subjects: tuple[tuple[int, ...], ...]
    fillers: tuple[tuple[int, ...], ...]
    long: tuple[int, ...] | None = None
    generate: int = 12
    sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 8, 13, 16, 17, 32, 33, 64)
    labels: tuple[str, ...] = field(default=())
    prefix: tuple[int, ...] = ()
    clients: int = 0
    score_sizes: tuple[int, ...] = ()
    places: tuple[int, ...] = (0, 4, 8)
    budgets: tuple[int, ...] = (33, 64, 256)

    @staticmethod
    def random(
        vocab_size: int,
        *,
        long: int = 0,
        seed: int = 1,
        lengths: Sequence[int] = (3, 37, 150, 411),
        fillers: int = 63,
        generate: int = 12,
        sizes: Sequence[int] | None = None,
        filler_lengths: Sequence[int] = (2, 5, 9, 17, 33, 64, 120, 257),
        prefix: int = 0,
        clients: int = 0,
        score_sizes: Sequence[int] = (),
    ) -> Workload:
        """Prompts of random tokens; the same arguments give the same prompts. long, prefix: lengths, 0 for none."""
        source = random.Random(seed)

        def prompt(length: int) -> tuple[int, ...]:
            return tuple(source.randrange(vocab_size - vocab_size // 16) for _ in range(length))

        return Workload(
            subjects=tuple(prompt(n) for n in lengths),
            fillers=tuple(prompt(source.choice(filler_lengths)) for _ in range(fillers)),
            long=prompt(long) if long else None,
            generate=generate,
            sizes=Workload.sizes if sizes is None else tuple(sizes),
            prefix=prompt(prefix),
            clients=clients,
            score_sizes=tuple(score_sizes),
        )

    def label(self, index: int) -> str:
        return self.labels[index] if index < len(self.labels) else f"prompt of {len(self.subjects[index])} tokens"

    def greedy(self, index: int) -> Request:
        return Request(self.subjects[index], max_tokens=self.generate, logprobs=3)

    def filler(self, index: int, **changes: object) -> Request:
        return Request(self.fillers[index % len(self.fillers)], max_tokens=self.generate).but(**changes)


class Run:
    """Runs a workload on one engine. Each request is answered alone only once; later answers are compared with that.

    notes: remarks of the running probe, besides its cases.
    """

    def __init__(self, engine: Engine, workload: Workload) -> None:
        self.engine, self.workload = engine, workload
        self.notes: list[str] = []
        self._solo: dict[Request, Answer] = {}

    @property
    def subjects(self) -> range:
        return range(len(self.workload.subjects))

    def greedy(self, index: int) -> Request:
        return self.workload.greedy(index).but(digest=self.engine.options.digests and not self.engine.info.pooling)

    def holds(self, batch: Sequence[Request]) -> bool:
        """Whether the KV cache has room for all requests to their last token, so that none waits or is preempted."""
        info = self.engine.info
        needed = sum(info.blocks(len(r.prompt) + len(r.images) * info.images + r.max_tokens) for r in batch)
        return info.kv_blocks <= 1 or needed < info.kv_blocks  # vLLM keeps one null block, also without a cache

    def alone(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers to each request alone, on an empty cache."""
        for request in requests:
            if request.but(delay=0) not in self._solo:
                self.engine.reset_cache()
                (self._solo[request.but(delay=0)],) = self.engine.generate([request.but(delay=0)])
        return [self._solo[request.but(delay=0)] for request in requests]

    def together(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers to all requests in one batch, on an empty cache."""
        self.engine.reset_cache()
        return self.engine.generate(requests)

    def scenario(self, scenario: Scenario) -> Answer:
        """The target's answer in a scenario on this engine: an empty cache, the warm-up batches, the batch."""
        if scenario.chunk is not None:
            self.engine.set_chunk(scenario.chunk)
        try:
            self.engine.reset_cache()
            for batch in scenario.warmup:
                self.engine.generate(batch)
            if scenario.pause is not None:
                self.engine.ask("pause", msgspec.msgpack.encode(scenario.pause))
            return self.engine.generate(scenario.requests)[scenario.index]
        finally:
            if scenario.chunk is not None:
                self.engine.set_chunk(None)

    def beside(self, before: Sequence[Request], request: Request, after: Sequence[Request], label: str) -> Case:
        """Compare the request between others, on an empty cache, with the request alone."""
        (expected,) = self.alone([request])
        company = Scenario.among(before, request, after)
        got = self.together(company.requests)[company.index]
        return pair(label, Scenario.alone(request), company, expected, got)

    def each(self, batch: Sequence[Request], places: Mapping[int, str]) -> Iterator[Case]:
        """Run a batch on an empty cache and compare the requests at some places with the same requests alone.

        places: the label of each compared place.
        """
        expected = dict(zip(places, self.alone([batch[place] for place in places])))
        answers = self.together(batch)
        for place, label in places.items():
            yield pair(
                label, Scenario.alone(batch[place]), Scenario(list(batch), place), expected[place], answers[place]
            )


def unpooled(probe: Probe | CrossProbe, engine: Engine) -> str:
    """Why an axis does not apply to the engine's kind of model, "" where it applies."""
    return "" if probe.pools or not engine.info.pooling else "a pooling model generates no tokens"


def either(*missing: Callable[[Engine], str]) -> Callable[[Engine], str]:
    """The first of several reasons why a probe does not apply."""
    return lambda engine: next(filter(None, (why(engine) for why in missing)), "")


def pair(label: str, alone: Scenario, company: Scenario, expected: Answer, got: Answer, part: str = "") -> Case:
    """A case without an axis; Probe.cases fills in the axis."""
    return Case.of("", label, alone, company, expected, got, part)


@dataclass(frozen=True)
class Probe:
    """One axis within one engine.

    measure: yields a case for each compared pair; may raise NotExercised. missing: why the probe does not apply to an
    engine, "" when it applies. causes: numbers in docs/causes.md. seconds: the time on a small model, for the time
    left. options: changes to the base engine's options for a probe that needs another engine, else None.
    optional: whether a vLLM build may lack the feature, so that an engine that does not start is no failure. pools:
    whether the axis applies to pooling models, whose vectors are then compared.
    """

    name: str
    about: str
    measure: Callable[[Run], Iterator[Case]]
    causes: tuple[int, ...] = ()
    missing: Callable[[Engine], str] = lambda engine: ""
    seconds: float = 3.0
    options: Callable[[Options], dict[str, object]] | None = None
    optional: bool = False
    pools: bool = False

    def cases(self, run: Run) -> Iterator[Case]:
        for case in self.measure(run):
            yield msgspec.structs.replace(case, axis=self.name)

    def run(self, engine: Engine, workload: Workload) -> Result:
        return Result.of(self.name, self.cases(Run(engine, workload)))


@dataclass(frozen=True)
class Change:
    """How an engine differs from the base engine.

    options: changes to the base engine's options; {} starts a new process with the same options. fresh: the engine
    starts with empty compile caches.
    """

    label: str
    options: dict[str, object]
    fresh: bool = False


@dataclass(frozen=True)
class CrossProbe:
    """One axis across engines: `collect` runs on the base engine, and on one engine for each change. See Probe.

    check: gets a change and how far each counter moved; raises NotExercised when the cause did not occur. compiles:
    whether an eager base engine's other engine is compiled. single: whether its engine serves no other probe. pools: as
    for Probe.
    """

    name: str
    about: str
    changes: Callable[[Engine], Sequence[Change]]
    requests: Callable[[Engine, Workload], list[Request]]
    check: Callable[[Change, dict[str, float]], None] = lambda change, counted: None
    causes: tuple[int, ...] = ()
    missing: Callable[[Engine], str] = lambda engine: ""
    seconds: float = 6.0
    optional: bool = False
    compiles: bool = False
    single: bool = False
    pools: bool = False

    def collect(self, engine: Engine, workload: Workload, change: Change | None = None) -> list[Answer]:
        """The answers of one engine, on an empty cache. change: how this engine differs, None for the base engine."""
        engine.reset_cache()
        before = engine.counters()
        answers = engine.generate(self.requests(engine, workload))
        if change is not None:
            self.check(change, {k: v - before.get(k, 0.0) for k, v in engine.counters().items()})
        return answers

    def cases(
        self, change: Change, requests: Sequence[Request], expected: Sequence[Answer], got: Sequence[Answer]
    ) -> Iterator[Case]:
        """Compare the base engine's answers with the changed engine's, request by request."""
        for i, (mine, other) in enumerate(zip(expected, got, strict=True)):
            yield Case.of(
                self.name,
                f"{change.label}: request {i} ({len(requests[i].prompt)} tokens)",
                Scenario(list(requests), i),
                Scenario(list(requests), i, options=change.options, fresh=change.fresh),
                mine,
                other,
            )

    def judge(self, change: Change, expected: Sequence[Answer], got: Sequence[Answer]) -> Result:
        nobody = [Request(())] * len(expected)
        return Result.of(self.name, self.cases(change, nobody, expected, got))
