"""What a probe is: cases within one engine, or across engines; the prompts it works on; what it asks of an engine."""

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
    """A local folder's config.json; empty for a name and for a folder without one."""
    path = Path(model).expanduser() / "config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


class Result(msgspec.Struct, frozen=True):
    """One axis on one engine: positions compared bitwise, how many differ, and words for the first one."""

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
    """subjects: prompts whose answers are compared; fillers: what runs beside them; all token ids.

    long: one prompt of up to 3,000 tokens, or None where max_model_len is too small for it.
    generate: tokens generated per request. sizes: numbers of concurrent requests. prefix: tokens that requests of the
    shared-prefix axis have in common. clients: requests at once against a server. score_sizes: as sizes, for prompt
    logprobs and sampling; empty for the same. places: where a subject stands in a batch of nine. budgets: tokens per
    engine step, as far as they are below the engine's own.
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
        """Prompts of random tokens, the same for the same arguments. long, prefix: lengths, 0 for none."""
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
    """One engine with the workload that is asked of it. Solo answers are asked once and kept: later ones are compared
    with the first, however long ago that was. notes: what the running probe has to say besides its cases."""

    def __init__(self, engine: Engine, workload: Workload) -> None:
        self.engine, self.workload = engine, workload
        self.notes: list[str] = []
        self._solo: dict[Request, Answer] = {}

    @property
    def subjects(self) -> range:
        return range(len(self.workload.subjects))

    def greedy(self, index: int) -> Request:
        return self.workload.greedy(index).but(digest=self.engine.options.digests)

    def holds(self, batch: Sequence[Request]) -> bool:
        """Whether the KV cache has room for all at once, to their last token; else some wait or are preempted."""
        info = self.engine.info
        needed = sum(-(-(len(r.prompt) + r.max_tokens) // info.block_size) for r in batch)
        return not info.kv_tokens or needed < info.kv_tokens // info.block_size  # one block is vLLM's null block

    def alone(self, requests: Sequence[Request]) -> list[Answer]:
        """Each request by itself, on a cold cache."""
        for request in requests:
            if request.but(delay=0) not in self._solo:
                self.engine.reset_cache()
                (self._solo[request.but(delay=0)],) = self.engine.generate([request.but(delay=0)])
        return [self._solo[request.but(delay=0)] for request in requests]

    def together(self, requests: Sequence[Request]) -> list[Answer]:
        """All at once, on a cold cache."""
        self.engine.reset_cache()
        return self.engine.generate(requests)

    def beside(self, before: Sequence[Request], request: Request, after: Sequence[Request], label: str) -> Case:
        """The request between others, on a cold cache, against itself alone."""
        (expected,) = self.alone([request])
        company = Scenario.among(before, request, after)
        got = self.together(company.requests)[company.index]
        return pair(label, Scenario.alone(request), company, expected, got)

    def each(self, batch: Sequence[Request], places: Mapping[int, str]) -> Iterator[Case]:
        """One batch on a cold cache; the requests at these places against themselves alone. places: their labels."""
        expected = dict(zip(places, self.alone([batch[place] for place in places])))
        answers = self.together(batch)
        for place, label in places.items():
            yield pair(
                label, Scenario.alone(batch[place]), Scenario(list(batch), place), expected[place], answers[place]
            )


def either(*missing: Callable[[Engine], str]) -> Callable[[Engine], str]:
    """The first of several reasons why a probe does not apply."""
    return lambda engine: next(filter(None, (why(engine) for why in missing)), "")


def pair(label: str, alone: Scenario, company: Scenario, expected: Answer, got: Answer, part: str = "") -> Case:
    """A case whose axis the probe fills in."""
    return Case.of("", label, alone, company, expected, got, part)


@dataclass(frozen=True)
class Probe:
    """One axis within one engine.

    measure: yields a case per compared pair; may raise NotExercised. missing: why it does not apply to an engine, ""
    when it does. causes: numbers of docs/causes.md. seconds: how long it takes on a small model, for time left.
    options: changes to the base engine's options when it needs an engine of its own, else None.
    optional: with an engine of its own, whether a build that cannot start it just lacks the feature.
    """

    name: str
    about: str
    measure: Callable[[Run], Iterator[Case]]
    causes: tuple[int, ...] = ()
    missing: Callable[[Engine], str] = lambda engine: ""
    seconds: float = 3.0
    options: Callable[[Options], dict[str, object]] | None = None
    optional: bool = False

    def cases(self, run: Run) -> Iterator[Case]:
        for case in self.measure(run):
            yield msgspec.structs.replace(case, axis=self.name)

    def run(self, engine: Engine, workload: Workload) -> Result:
        return Result.of(self.name, self.cases(Run(engine, workload)))


@dataclass(frozen=True)
class Change:
    """options: what differs from the base engine's options ({} = the same, in a new process).

    fresh: with empty compile caches.
    """

    label: str
    options: dict[str, object]
    fresh: bool = False


@dataclass(frozen=True)
class CrossProbe:
    """One axis across engines: `collect` runs on the base engine and on one engine per change. See Probe."""

    name: str
    about: str
    changes: Callable[[Engine], Sequence[Change]]
    requests: Callable[[Engine, Workload], list[Request]]
    check: Callable[[Change, dict[str, float]], None] = lambda change, counted: None
    causes: tuple[int, ...] = ()
    missing: Callable[[Engine], str] = lambda engine: ""
    seconds: float = 6.0
    optional: bool = False

    def collect(self, engine: Engine, workload: Workload, change: Change | None = None) -> list[Answer]:
        """The answers of one engine, cold. change: what this engine changed, None for the base engine."""
        engine.reset_cache()
        before = engine.counters()
        answers = engine.generate(self.requests(engine, workload))
        if change is not None:
            self.check(change, {k: v - before.get(k, 0.0) for k, v in engine.counters().items()})
        return answers

    def cases(
        self, change: Change, requests: Sequence[Request], expected: Sequence[Answer], got: Sequence[Answer]
    ) -> Iterator[Case]:
        """Request by request, what the base engine answered against what the changed one did."""
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
