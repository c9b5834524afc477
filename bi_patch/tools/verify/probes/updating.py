"""The axis "weight update": an engine that got weights answers as an engine that was started with them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import msgspec

from bi_patch.errors import BiPatchError
from bi_patch.platforms import schemes
from bi_patch.platforms.features import scheme_kinds
from bi_patch.tools.verify import checkpoint, updates
from bi_patch.tools.verify.answers import Answer, Request, compare
from bi_patch.tools.verify.case import Case, Scenario, Update
from bi_patch.tools.verify.child import ARMED
from bi_patch.tools.verify.engine import HITS, SERVER, Engine
from bi_patch.tools.verify.instruments import InFlight
from bi_patch.tools.verify.probes.base import Change, CrossProbe, NotExercised, Workload

_SEED = 5  # of the other weights
_SLACK = 0.05  # the share of the weights by which updates may let an engine grow
_folders: dict[str, tempfile.TemporaryDirectory] = {}
# Folder that an engine was started with -> its updates, and what went wrong besides bits.
_given: dict[str, tuple[list[Update], BiPatchError | None]] = {}


class UpdateFailed(BiPatchError):
    """An update kept old weights in memory, or did not mark an answer that spans it."""


def missing(engine: Engine) -> str:
    options = engine.options
    if engine.info.platform == SERVER:
        return "verify gives a running server no weights"
    if options.random_weights is not None or options.tied:
        return "made weights cannot be loaded again; give a folder with weights"
    if not any(Path(options.model).expanduser().glob("*.safetensors")):
        return "needs a local folder with safetensors"
    named = _kept(engine) if engine.info.quantization else ""
    return f"weights are quantized ({named}), and no new ones may come" if named else ""


def _kept(engine: Engine) -> str:
    """The schemes of an engine's quantized weights that take no new weights, in words."""
    if engine.info.platform != "cpu":
        return engine.info.quantization
    held = json.loads((Path(engine.options.model).expanduser() / "config.json").read_text())
    model = SimpleNamespace(quantization=engine.info.quantization, hf_config=SimpleNamespace(**held))
    tiles = ", AMX" in engine.info.device and engine.options.dtype == "bfloat16"  # vLLM's own kernel for INT8
    return "; ".join(str(s) for s in schemes.of(SimpleNamespace(model_config=model)) if not _updated(s, tiles))


def _updated(scheme: schemes.Scheme, tiles: bool) -> bool:
    if scheme_kinds.int8(scheme, schemes.TOKEN, static=False):
        return not tiles
    return scheme_kinds.weight_only(scheme, 4)


def other(model: str) -> str:
    """A folder with the same model and other weights, made once for this process."""
    if model not in _folders:
        _folders[model] = tempfile.TemporaryDirectory(prefix="bi_patch-weights-")
        checkpoint.write(model, _SEED, Path(_folders[model].name))
    return _folders[model].name


def ways(engine: Engine) -> list[str]:
    """The ways to give this engine weights. A CPU engine has no sleep mode, and packs weights that it then frees."""
    if int(engine.options.extra.get("tensor_parallel_size", 1)) > 1:  # the others need the model in this process
        return [updates.RELOAD]
    if engine.info.platform == "cpu":
        return [way for way in updates.WAYS if way not in (*updates.IN_PLACE, *updates.SLEEPS)]
    return [*updates.WAYS, *updates.IN_PLACE]  # their first round also reloads, to have what they write


def changes(engine: Engine) -> list[Change]:
    model = engine.options.model
    sleep = {"enable_sleep_mode": True} if updates.SLEEP in ways(engine) else {}
    started = {"model": other(model), "extra": {**engine.options.extra, **sleep}}
    return [Change("other weights, then updates", started)]


def requests(engine: Engine, workload: Workload) -> list[Request]:
    """The subjects, and a prompt that fills KV blocks."""
    digest = engine.options.digests
    made = [workload.greedy(i).but(digest=digest) for i in range(len(workload.subjects))]
    if workload.prefix:
        made.append(Request(workload.prefix, max_tokens=workload.generate, logprobs=3, digest=digest))
    return made


def _updates(engine: Engine) -> list[Update]:
    """To the base engine's weights and back, in each way. The engine was started with the other weights."""
    started = engine.options.model
    base = next(model for model, folder in _folders.items() if folder.name == started)
    return [Update(way, model) for way in ways(engine) for model in (base, started)]


@dataclass(frozen=True)
class UpdateProbe(CrossProbe):
    """The changed engine was started with other weights. It gets the base engine's weights and its own ones in turns.

    Nothing resets its prefix cache.
    """

    def collect(self, engine: Engine, workload: Workload, change: Change | None = None) -> list[Answer]:
        """The base engine: its answers. The changed engine: its answers as started, then after each update."""
        asked = self.requests(engine, workload)
        engine.reset_cache()
        answers = engine.generate(asked)
        if change is None:
            return answers
        sizes, steps = [_size(engine)], _updates(engine)
        for update in steps:
            engine.ask("update", msgspec.msgpack.encode(update))
            answers += engine.generate(asked)
            sizes.append(_size(engine))
        _given[engine.options.model] = steps, _problem(engine, asked, sizes)
        return answers

    def cases(
        self, change: Change, requests: Sequence[Request], expected: Sequence[Answer], got: Sequence[Answer]
    ) -> Iterator[Case]:
        count, started = len(requests), str(change.options["model"])
        steps, problem = _given[started]
        if not any(compare(a, b).differing for a, b in zip(expected, got)):
            raise NotExercised("weight update: the other weights give the same answers")
        for number in range(1, len(got) // count):
            to_base = number % 2 == 1
            known = expected if to_base else got[:count]
            for i, answer in enumerate(got[number * count : (number + 1) * count]):
                yield Case.of(
                    self.name,
                    f"update {number}, {'to' if to_base else 'back from'} the first engine's weights: request {i} "
                    f"({len(requests[i].prompt)} tokens)",
                    Scenario(list(requests), i, options={} if to_base else change.options),
                    Scenario(list(requests), i, [list(requests)], change.options, updates=steps[:number]),
                    known[i],
                    answer,
                )
        if problem is not None:
            raise problem


def _size(engine: Engine) -> int:
    return msgspec.msgpack.decode(engine.ask("held", b""), type=tuple[int, int])[1]


def _problem(engine: Engine, asked: list[Request], sizes: list[int]) -> BiPatchError | None:
    """What an update did wrong besides bits. sizes: the bytes that the engine held, first before all updates."""
    try:
        weights = sum(file.stat().st_size for file in Path(engine.options.model).glob("*.safetensors"))
        if max(sizes) > sizes[0] + weights * _SLACK:
            return UpdateFailed(
                f"weight update: an engine of {sizes[0]:,} bytes grew to {max(sizes):,} bytes; after each update "
                f"{', '.join(f'{size:,}' for size in sizes[1:])}"
            )
        if engine.info.mode == ARMED:
            _hits(engine, asked)
            _marks(engine, asked)
    except (UpdateFailed, NotExercised) as error:
        return error
    return None


def _hits(engine: Engine, asked: list[Request]) -> None:
    """The prefix cache must still serve: a cache that nobody can hit would hide old keys and values."""
    before = engine.counters().get(HITS, 0.0)
    engine.generate(asked)
    long = any(len(request.prompt) > engine.info.block_size for request in asked)
    if engine.options.prefix_caching and engine.info.cached and long and engine.counters().get(HITS, 0.0) <= before:
        raise NotExercised("weight update: the engine's counter of prefix cache hits did not move")


def _marks(engine: Engine, asked: list[Request]) -> None:
    """An answer over an update must say so, and the next one must not."""
    update = Update(updates.RELOAD, engine.options.model)
    request = max(asked, key=lambda r: len(r.prompt)).but(max_tokens=8, digest=False)
    data = engine.ask("update in flight", msgspec.msgpack.encode(InFlight(update, [request])))
    (spanning,) = msgspec.msgpack.decode(data, type=list[Answer])
    (after,) = engine.generate([request])
    if not spanning.weights_changed or after.weights_changed:
        raise UpdateFailed("weight update: the engine marks other answers than those over an update")
