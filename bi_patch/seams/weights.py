"""New weights in this process: which weights are loaded, and what has to follow when they change.

Cached keys and values belong to the weights that computed them. So the identity of the loaded weights is a part of the
hash of each prompt's first block. The identity is random: a counter would repeat after a restart, and in another
engine. Engine cores register with `watch_core`, models with `watch_model`.

A worker may be another process than its engine core. The core then renews its identity around its own calls to the
workers, and tells them with `told`. A write that no core knows of stops the next step.
"""

from __future__ import annotations

import functools
import os
import secrets
import weakref
from collections.abc import Callable
from typing import Any

from bi_patch.errors import NoEngine, UnsupportedFeature, WeightsBroken

_identity = secrets.token_hex(16)
_cores: weakref.WeakKeyDictionary[Any, Callable[[Any], None]] = weakref.WeakKeyDictionary()
os.register_at_fork(after_in_child=_cores.clear)  # a forked worker runs no engine core of its parent
_models: weakref.WeakKeyDictionary[Any, Callable[[Any], object]] = weakref.WeakKeyDictionary()
_writes: weakref.WeakKeyDictionary[Any, Callable[[Any], object]] = weakref.WeakKeyDictionary()
_broken: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()  # why a model may not compute
pending = False  # the next step has something to do: see `ready`
_untold = False  # weights changed in this process, which has no engine core, and no core said that it knows


def identity() -> str:
    """The identity of the weights that this process serves, 32 hexadecimal digits."""
    return _identity


def watch_core(core: Any, renew: Callable[[Any], None]) -> None:
    """Call renew(core) whenever the identity changes. core: vLLM's EngineCore, held weakly."""
    _cores[core] = renew


def _nothing(model: Any) -> None:
    """What a platform does whose layers compute with the parameters themselves."""


def watch_model(
    model: Any,
    before: Callable[[Any], object] = _nothing,
    settle: Callable[[Any], object] = _nothing,
    written: Callable[[Any], object] = _nothing,
) -> None:
    """Let `model.load_weights` of a loaded model tell that the model got weights.

    model: a torch.nn.Module, held weakly. before(model): runs before such a load. settle(model): runs before a model
    with new weights computes. written(model): runs first in `weights_changed`, and may refuse.
    """
    held, mine = type(model).load_weights, weakref.ref(model)

    @functools.wraps(held)
    def load_weights(*args, **kwargs):
        try:
            before(mine())
            return held(mine(), *args, **kwargs)
        finally:
            wrote()

    model.load_weights = load_weights
    _models[model], _writes[model] = settle, written


def wrote() -> None:
    """Note that a model of this process got weights: the identity changes, and the next step calls `settle`."""
    global pending
    pending = True
    _changed()


def _changed() -> None:
    global pending, _untold
    if not _cores:
        pending = _untold = True
    renew()


def told() -> None:
    """Note that the engine core of this worker knows of all writes so far."""
    global _untold
    _untold = False


def renew() -> None:
    """Take a new identity, and tell every engine core of this process."""
    global _identity
    _identity = secrets.token_hex(16)
    for core, call in list(_cores.items()):
        call(core)


def ready() -> None:
    """Before a step with `pending`: refuse weights that the engine core does not know of, and settle the others.

    Raises WeightsBroken, and what `settle` raises.
    """
    if _untold:
        raise WeightsBroken(
            "weights were written in a worker, but not by a call through the engine, so the engine core would use keys "
            "and values of the old weights. Write them by llm.collective_rpc (an executor's own collective_rpc is not "
            "enough), or follow the write with llm.collective_rpc(lambda worker: bi_patch.weights_changed())"
        )
    settle()


def refuse_with_lora(config: Any) -> None:
    """Raise UnsupportedFeature for new weights of an engine with LoRA. config: its VllmConfig."""
    if getattr(config, "lora_config", None) is not None:
        raise UnsupportedFeature(
            "weights.lora: bi_patch does not cover weight updates of an engine with LoRA. Start an engine with the new "
            "weights, or without LoRA"
        )


def before_step(original):
    """Wrap a model runner's step. It costs the look at one flag while no weights change."""

    @functools.wraps(original)
    def run(self, *args, **kwargs):
        if pending:
            ready()
        return original(self, *args, **kwargs)

    return run


def settle() -> None:
    """Make again what every model of this process derives from its weights, e.g. packed copies.

    A model for which that fails stays broken: a part of its weights is old, and nobody knows which. Its error is raised
    once. `pending` stays, so that every later call raises WeightsBroken.
    """
    global pending
    pending = True
    for model, what in list(_broken.items()):
        raise WeightsBroken(
            f"an update of the weights of {type(model).__name__} failed half way, so the engine stops. Start it "
            f"again. What failed: {what}"
        )
    for model, call in list(_models.items()):
        _or_broken(model, call)
    pending = _untold


def _or_broken(model: Any, call: Callable[[Any], object]) -> None:
    """Run call(model). If it fails, nobody knows the model's weights, and each later step raises WeightsBroken."""
    try:
        call(model)
    except BaseException as error:
        broke(model, error)
        raise


def broke(model: Any, error: BaseException) -> None:
    """Note that an update of a model failed half way: each later step raises WeightsBroken with the first error.

    model: a torch.nn.Module, held weakly. `watch_model` need not know it: a draft model shares layers with the target.
    """
    global pending
    pending = True
    _broken.setdefault(model, f"{type(error).__name__}: {error}")


def models() -> list[Any]:
    """The models of this process that `watch_model` got."""
    return list(_models)


def weights_changed() -> None:
    """Say that weights were written in place (`parameter.copy_(...)`), which no patch point sees.

    Call it in the process that wrote, after the last write and before the next request: in the engine's own process,
    or in its workers through `collective_rpc`. Packed copies are made again, prefixes that the old weights computed are
    not used any more, and requests in flight are marked. Weights that vLLM loads itself need no call.
    Raises NoEngine if this process has neither an armed engine nor a model of such an engine, and UnsupportedFeature
    for a model that takes no new weights.
    """
    if not _cores and not _models:
        raise NoEngine(
            "weights_changed: this process has no armed engine and no model of an armed engine. Call it where the "
            "weights were written, e.g. with llm.collective_rpc"
        )
    _changed()
    for model, call in list(_writes.items()):
        _or_broken(model, call)
    settle()
