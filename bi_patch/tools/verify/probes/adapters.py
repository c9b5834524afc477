"""The axes of LoRA: requests with adapters beside others, and requests without an adapter on an engine with LoRA.

Both make random adapters of several ranks, more than the engine has slots: adapters are loaded, evicted and loaded
again all the time.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bi_patch.tools.models import adapters as made
from bi_patch.tools.verify.answers import Answer, Request
from bi_patch.tools.verify.case import Case, Scenario
from bi_patch.tools.verify.engine import SERVER, Engine, Options
from bi_patch.tools.verify.probes import images
from bi_patch.tools.verify.probes.base import Change, CrossProbe, NotExercised, Run, Workload, config, pair

RANKS = (8, 64, 16, 256)
EXPERT_RANKS = (8, 32, 16, 64)  # of adapters that change experts, which are as many as the experts
SLOTS = 2  # fewer than adapters
_LEAST = 8  # concurrent requests: every level has a batch of this size or more, with room beside its subjects
_MOST = 40  # requests of a batch


def missing(engine: Engine) -> str:
    """Why no adapter can be made for the engine's model, "" when an adapter can be made."""
    found = config(engine.options.model)
    if engine.info.platform == SERVER:
        return "verify gives a running server no adapters"
    if not found:
        return "making an adapter needs the model's config.json, and the model is not a local folder"
    if engine.options.max_num_seqs < _LEAST:
        return f"max_num_seqs is {engine.options.max_num_seqs}: no batch of {_LEAST} requests"
    if "num_experts" in found and engine.info.platform != "cuda":
        return "vLLM runs adapters of models with experts on CUDA only"
    return made.missing(found)


def options(base: Options) -> dict[str, object]:
    given = {"enable_lora": True, "max_lora_rank": max(_ranks(config(base.model))), "max_loras": SLOTS}
    return {"extra": {**base.extra, **given}}


def lora(run: Run) -> Iterator[Case]:
    """Each subject with an adapter: in batches with other adapters and with none, after other adapters were loaded, and
    with the keys and values of other adapters in the cache."""
    load, folders = run.workload, adapters(run.engine)
    subjects = [run.greedy(i).but(lora=folders[i % len(folders)]) for i in run.subjects]
    for request, plain in zip(subjects, map(run.greedy, run.subjects)):
        if run.alone([request])[0] == run.alone([plain])[0]:
            raise NotExercised("LoRA: the adapter changed nothing")
    requests = [*subjects, run.greedy(0)]
    labels = [*(f"{load.label(i)} with an adapter" for i in run.subjects), f"{load.label(0)} without an adapter"]
    for size in (n for n in load.sizes if len(requests) < n <= _MOST):
        batch = [*company(load, folders, size - len(requests)), *requests]
        order = [*range(0, size, 2), *range(1, size, 2)]  # the requests stand between the others
        places = {
            order.index(size - len(requests) + i): f"{text}, in a batch of {size}" for i, text in enumerate(labels)
        }
        yield from run.each([batch[i] for i in order], places)
    longest = max(run.subjects, key=lambda i: len(load.subjects[i]))
    same = [run.greedy(longest).but(lora=folder) for folder in ("", *folders)]
    for i, request in enumerate(same):
        (expected,) = run.alone([request])
        others = [[other] for other in same[i + 1 :] + same[:i]]
        scenario = Scenario([request], warmup=others)
        label = f"{load.label(longest)} after the same prompt with {len(others)} other adapters"
        yield pair(label, Scenario.alone(request), scenario, expected, run.scenario(scenario))
    scored = [run.greedy(i).but(lora=folders[-1 - i % len(folders)], prompt_logprobs=1) for i in run.subjects]
    batch = [*company(load, folders, 3), *scored]
    yield from run.each(batch, {3 + i: f"prompt logprobs of {load.label(i)}" for i in run.subjects})


def company(load: Workload, folders: Sequence[str], count: int) -> list[Request]:
    """Other requests, with each adapter in turn and with none."""
    return [load.filler(i, lora=("", *folders)[i % (len(folders) + 1)]) for i in range(count)]


def changes(engine: Engine) -> list[Change]:
    return [Change("LoRA on", options(engine.options))]


def plain(engine: Engine, workload: Workload) -> list[Request]:
    """The subjects and requests with images, without an adapter."""
    asked = [workload.greedy(i) for i in range(len(workload.subjects))]
    if not images.missing(engine):
        asked += [request for request in images.subjects(engine, workload).values() if request.images]
    return [request.but(digest=engine.options.digests) for request in asked]


@dataclass(frozen=True)
class WithoutProbe(CrossProbe):
    """Requests without an adapter: alone on the base engine, and beside adapters on an engine with LoRA."""

    def _batch(self, engine: Engine, workload: Workload, asked: Sequence[Request]) -> list[Request]:
        others = company(workload, adapters(engine), max(0, min(8, engine.options.max_num_seqs - len(asked))))
        return [*asked, *others]

    def collect(self, engine: Engine, workload: Workload, change: Change | None = None) -> list[Answer]:
        asked = self.requests(engine, workload)
        engine.reset_cache()
        if change is None:
            return engine.generate(asked)
        batch = self._batch(engine, workload, asked)
        _batches[self.name] = batch
        return engine.generate(batch)[: len(asked)]

    def cases(
        self, change: Change, requests: Sequence[Request], expected: Sequence[Answer], got: Sequence[Answer]
    ) -> Iterator[Case]:
        batch = _batches[self.name]
        for i, (mine, other) in enumerate(zip(expected, got, strict=True)):
            yield Case.of(
                self.name,
                f"{change.label}: request {i} ({len(requests[i].prompt)} tokens) in a batch of {len(batch)}",
                Scenario(list(requests), i),
                Scenario(batch, i, options=change.options, fresh=change.fresh),
                mine,
                other,
            )


_batches: dict[str, list[Request]] = {}  # the last batch of a WithoutProbe


def _ranks(found: dict) -> tuple[int, ...]:
    """found: config.json."""
    return EXPERT_RANKS if "num_experts" in found else RANKS


def adapters(engine: Engine) -> tuple[str, ...]:
    """The folders of an adapter of each rank for the engine's model."""
    return _adapters(engine.options.model)


@functools.cache
def _adapters(model: str) -> tuple[str, ...]:
    """The folders of a random adapter of each rank for a local model. They are deleted when the process ends.

    The first changes every linear layer and all routed experts, the second a part of the linear layers and no expert,
    the others all. The last also changes embeddings and head, where vLLM takes them.
    """
    held = config(model)
    folders = []
    for i, rank in enumerate(_ranks(held)):
        last, experts = i == len(_ranks(held)) - 1, "num_experts" in held
        only = ("q_proj", "o_proj", *(() if experts else ("down_proj",))) if i == 1 else ()
        folder = Path(_folder()) / f"rank-{rank}"
        embedded = last and made.embeds(held)
        made.write(model, folder, seed=i + 1, rank=rank, only=only, embedded=embedded, experts=experts and not only)
        folders.append(str(folder))
    return tuple(folders)


_made: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


def _folder() -> str:
    _made.append(tempfile.TemporaryDirectory(prefix="bi_patch-lora-", ignore_cleanup_errors=True))
    return _made[-1].name
