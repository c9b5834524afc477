"""Gives a running engine of this process new weights, in each way that vLLM and trainers have."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bi_patch.tools.verify.answers import Answer, Request
from bi_patch.tools.verify.case import Update
from bi_patch.tools.verify.engine import LocalEngine

RELOAD, ITERATOR, LOAD, PIECES, COPY, RPC, SLEEP, SLEEP_2 = WAYS = (
    "reload_weights from a folder",
    "reload_weights from tensors",
    "model.load_weights",
    "model.load_weights, tensor by tensor",
    "parameter.copy_ and weights_changed",
    "collective_rpc with a function",
    "sleep level 1, then reload_weights",
    "sleep level 2, then reload_weights",
)
IN_PLACE = (COPY, RPC)  # these write what a reload of the same folder left in the parameters
SLEEPS = (SLEEP, SLEEP_2)

_kept: dict[str, dict[str, object]] = {}  # folder -> a copy of every parameter after a reload


def update(engine: LocalEngine, given: Update) -> None:
    """Give the engine the weights of a folder. The prefix cache is not reset. Raises ValueError for an unknown way."""
    _DO[given.way](engine, given.model)


def in_flight(engine: LocalEngine, given: Update, requests: Sequence[Request]) -> list[Answer]:
    """Answer requests together. The engine gets the weights after a few steps."""
    return engine.generate_around(requests, 3, lambda: update(engine, given))


def held() -> tuple[int, int]:
    """(tensors, bytes) that this process holds: of all CPU tensors, or of the CUDA allocator with 0 tensors."""
    import torch

    gc.unfreeze()  # vLLM froze what it had after its start, and the collector lists nothing that is frozen
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        return 0, torch.cuda.memory_allocated()
    held: dict[int, int] = {}
    for thing in gc.get_objects():
        with contextlib.suppress(RuntimeError):  # a compiler's stand-in for a tensor has no storage
            if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
                storage = thing.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
    return len(held), sum(held.values())


def _model(engine: LocalEngine):
    from bi_patch.tools.verify import runner

    return runner.model_runner(engine).get_model()


def _tensors(folder: str) -> Iterator[tuple[str, object]]:
    from safetensors import safe_open

    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as held:
            for name in held.keys():  # noqa: SIM118  the file is no dict
                yield name, held.get_tensor(name)


def _reload(engine: LocalEngine, folder: str) -> None:
    engine.rpc("reload_weights", weights_path=folder)


def _iterator(engine: LocalEngine, folder: str) -> None:
    engine.rpc("reload_weights", weights_iterator=_tensors(folder))


def _load(engine: LocalEngine, folder: str) -> None:
    _model(engine).load_weights(_tensors(folder))


def _pieces(engine: LocalEngine, folder: str) -> None:
    model = _model(engine)
    for pair in _tensors(folder):
        model.load_weights([pair])


def _parameters(engine: LocalEngine, folder: str) -> dict[str, object]:
    """A copy of every parameter of the folder's weights, on the host: the device may not hold several.

    On CPU without the experts, which are packed, so that a write of them is refused.
    """
    if folder not in _kept:
        _reload(engine, folder)
        packed = ("w13_weight", "w2_weight") if engine.info.platform == "cpu" else ()
        held = _model(engine).named_parameters()
        _kept[folder] = {name: p.detach().cpu().clone() for name, p in held if not name.endswith(packed)}
    return _kept[folder]


def _write(model, values: dict[str, object]) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(values[name])


def _copy(engine: LocalEngine, folder: str) -> None:
    from bi_patch.seams.weights import weights_changed

    _write(_model(engine), _parameters(engine, folder))
    if engine.info.mode == "armed":
        weights_changed()


def _rpc(engine: LocalEngine, folder: str) -> None:
    values = _parameters(engine, folder)
    engine.rpc(lambda worker: _write(worker.get_model(), values))


def _slept(level: int) -> Callable[[LocalEngine, str], None]:
    def do(engine: LocalEngine, folder: str) -> None:
        engine.sleep_and_wake(level)
        _reload(engine, folder)

    return do


_DO: dict[str, Callable[[LocalEngine, str], None]] = {
    RELOAD: _reload,
    ITERATOR: _iterator,
    LOAD: _load,
    PIECES: _pieces,
    COPY: _copy,
    RPC: _rpc,
    SLEEP: _slept(1),
    SLEEP_2: _slept(2),
}
