"""Planted faults: what trainers and weight updates get wrong. parity must find each on its line and name the place."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from bi_patch.tools.parity.child import ParityEngine
from bi_patch.tools.parity.plan import Plan

if TYPE_CHECKING:
    from bi_patch.tools.parity.session import Session

_LATE = "layers.1"  # the layer in which faults of weights are planted


@dataclass(frozen=True)
class Fault:
    """One fault. line: on which parity must find it. names: a text that the place which parity names must hold."""

    name: str
    about: str
    line: str
    names: str
    plant: Callable[[Session], contextlib.AbstractContextManager[None]]


class Caught(msgspec.Struct, frozen=True):
    """caught: the fault's line found a difference. named: parity named the place, which `words` describes."""

    fault: str
    line: str
    caught: bool
    named: bool
    words: str


@contextlib.contextmanager
def _replaced(owner, name: str, wrap: Callable) -> Iterator[None]:
    """Within this block, `owner.name` is wrap(owner.name). owner: an object, a class or a module."""
    held, own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, wrap(held))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, held)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def planted(name: str, session: Session) -> Iterator[None]:
    """Within this block, the fault of this name is planted; "" plants none."""
    if not name:
        yield
        return
    with next(fault for fault in FAULTS if fault.name == name).plant(session):
        yield


def catch_all(system, tell: Callable[[str], None] = lambda text: None) -> list[Caught]:
    """Plant every fault in one process, one after the other, on a model with a tied head. tell: called for each."""
    found = []
    with system.start(system.options, kind=ParityEngine) as engine:
        for fault in FAULTS:
            found.append(catch(engine, fault))
            tell(_told(found[-1]))
    return found


def catch(engine: ParityEngine, fault: Fault, plan: Plan | None = None) -> Caught:
    """Plant one fault, measure its line, and remove the fault."""
    axis = engine.line(fault.line, msgspec.structs.replace(plan or Plan(updates=1, tokens=8), fault=fault.name))
    shown = axis.shown[0] if axis.shown else None
    words = (shown.located or shown.first) if shown else axis.reason
    return Caught(fault.name, fault.line, axis.differing > 0, axis.differing > 0 and fault.names in words, words)


def _told(caught: Caught) -> str:
    state = "caught and named" if caught.named else "caught, named wrongly" if caught.caught else "NOT CAUGHT"
    return f"{caught.fault}: {state} ({caught.line})\n   {caught.words}"


# ------------------------------------------------------------------------------------------- the trainer's operations


def _operator(name: str, make: Callable) -> Callable[[Session], contextlib.AbstractContextManager[None]]:
    """Let the armed model call make(the model's own operator) instead of its operator of this name."""

    @contextlib.contextmanager
    def plant(session: Session) -> Iterator[None]:
        from bi_patch.training import huggingface

        functions = huggingface.armed(session.trainer.model).functions
        held = functions[name]
        functions[name] = make(held)
        try:
            yield
        finally:
            functions[name] = held

    return plant


def _norm(held):
    """Transformers' norm rounds before it multiplies by the weight; this sum has two parts besides, for fp32."""

    def rms_norm(x, weight, eps, offset=0.0):
        wide = x.float()
        low, high = wide.pow(2).chunk(2, -1)
        mean = (low.sum(-1, keepdim=True) + high.sum(-1, keepdim=True)) / x.shape[-1]
        return (weight.to(x.dtype) + offset) * (wide * (mean + eps).rsqrt()).to(x.dtype)

    return rms_norm


def _silu(held):
    def gated(gate, up, kind):
        import torch

        return torch.nn.functional.silu(gate) * up

    return gated


def _sdpa(held):
    def attention(query, key, value, starts, lengths, scale, window, softcap, backend):
        import torch

        found = torch.zeros_like(query)
        groups = query.shape[1] // key.shape[1]
        for first, count in zip(starts.tolist(), lengths.tolist()):
            q, k, v = (x[first : first + count].transpose(0, 1) for x in (query, key, value))
            k, v = (x.repeat_interleave(groups, 0) for x in (k, v))
            own = torch.nn.functional.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, scale=scale
            )
            found[first : first + count] = own[0].transpose(0, 1)
        return found

    return attention


def _head(formula: Callable):
    """A head with another formula of log-softmax."""

    def make(held):
        def head(hidden, weight, tokens, temperature, *transforms):
            from bi_patch.training import ops

            logits = ops.linear(hidden, weight)
            return formula(logits).gather(-1, tokens[:, None])[:, 0].float()

        return head

    return make


def _subtracted(logits):
    wide = logits.float()
    return wide - wide.logsumexp(-1, keepdim=True)


def _rounded(logits):
    import torch

    return logits.to(torch.bfloat16).log_softmax(-1)


def _rotation(session: Session) -> contextlib.AbstractContextManager[None]:
    """Transformers' rotation, whose products are rounded one by one."""
    from bi_patch.training import hooks

    def wrap(held):
        def rotate(q, k, table):
            import torch

            cos, sin = (torch.cat((x, x), -1)[:, None] for x in table.chunk(2, -1))

            def turn(x):
                low, high = x.chunk(2, -1)
                return x * cos + torch.cat((-high, low), -1) * sin

            return turn(q), turn(k)

        return rotate

    return _replaced(hooks, "_rotate", wrap)


@contextlib.contextmanager
def _no_temperature(session: Session) -> Iterator[None]:
    """The trainer's logprobs leave the temperature out."""
    with _replaced(
        session.trainer,
        "logprobs",
        lambda held: lambda samples, layout, **given: held(samples, layout, **{**given, "temperature": 1.0}),
    ):
        yield


# --------------------------------------------------------------------------------------------------- weight updates


def _old_head(session: Session) -> contextlib.AbstractContextManager[None]:
    from bi_patch.tools.faults import weights

    return weights.old_head(session.engine)


def _old_handle(session: Session) -> contextlib.AbstractContextManager[None]:
    """A linear computes with the weights that it has now, as compiled code does that holds an old handle."""
    from bi_patch.tools.faults import weights

    return weights.old_products(session.engine, f"{_LATE}.mlp.gate_up_proj")


@contextlib.contextmanager
def _old_prefix(session: Session) -> Iterator[None]:
    """The sampler uses prefixes that old weights computed, and nobody resets its cache."""
    from bi_patch.tools.faults import weights
    from bi_patch.training import samplers

    with (
        weights.old_prefix(session.engine),
        _replaced(samplers.Engine, "forget", lambda held: lambda self: None),
    ):
        yield


@contextlib.contextmanager
def _left_out(session: Session) -> Iterator[None]:
    """The sync sends the first weights of one linear again."""
    sync = importlib.import_module("bi_patch.training.sync")  # the package has a function of this name
    left = f"model.{_LATE}.mlp.down_proj.weight"
    first = dict(session.trainer.model.named_parameters())[left].detach().clone()

    def wrap(held):
        def weights(model, dtype):
            for name, tensor in held(model, dtype):
                yield name, first.to(tensor.dtype) if name == left else tensor

        return weights

    with _replaced(sync, "weights", wrap):
        yield


# --------------------------------------------------------------------------------------------------------- gradients


def _one_chain(session: Session) -> contextlib.AbstractContextManager[None]:
    """The embedding and the tied head add to one chain."""
    from bi_patch.training.gradients import Gradients

    def wrap(held):
        def chain(self, parameter, use, call):
            self._last.pop((parameter, "layer"), None)
            return held(self, parameter, "layer", call)

        return chain

    return _replaced(Gradients, "chain", wrap)


def _whole_batch(session: Session) -> contextlib.AbstractContextManager[None]:
    """A weight's gradient is one product over the whole micro-batch."""
    from bi_patch.training.gradients import Gradients

    def wrap(held):
        def add(self, parameter, use, call, spans, grad, x, rule):
            held(self, parameter, use, call, ((0, x.shape[0]),), grad, x, rule)

        return add

    return _replaced(Gradients, "add", wrap)


FAULTS = (
    Fault("transformers' norm", "another order and rounding", "alone", "RMSNorm", _operator("rms_norm", _norm)),
    Fault("transformers' rotation", "rounds each product", "alone", "rotation", _rotation),
    Fault("transformers' SiLU", "rounds before it multiplies", "alone", "activation", _operator("gated", _silu)),
    Fault("sdpa", "another order of keys", "alone", "attention", _operator("attention", _sdpa)),
    Fault(
        "logits - logsumexp",
        "another formula of log-softmax",
        "alone",
        "log-softmax",
        _operator("head", _head(_subtracted)),
    ),
    Fault(
        "log-softmax in bf16",
        "log-softmax in 16 bits",
        "alone",
        "log-softmax",
        _operator("head", _head(_rounded)),
    ),
    Fault("temperature left out", "logprobs without the temperature", "sampling", "temperature", _no_temperature),
    Fault("stale head", "the head keeps its packed copy", "weight update", "lm_head", _old_head),
    Fault("baked handle", "a linear keeps its first weights", "weight update", f"{_LATE}.mlp", _old_handle),
    Fault("cache not reset", "cached prefixes of old weights", "weight update", "prefix cache", _old_prefix),
    Fault("one layer not synced", "one linear gets no weights", "weight update", f"{_LATE}.mlp.down_proj", _left_out),
    Fault("one chain for tied weights", "embedding and head in one chain", "gradients", "embed_tokens", _one_chain),
    Fault("gradient of the whole batch", "one product for all sequences", "gradients", "weight", _whole_batch),
)
NAMES = tuple(fault.name for fault in FAULTS)
