"""Arm a model of Hugging Face transformers in place: its own code runs, and its layers compute the sampler's bits.

The hooks are transformers' own: an attention function and a mask function of a name of their own, and a forward of each
leaf module. The rotation is a function of the model's module. The armed model's rotary table says which of two
rotations is meant, so that other models of the same class keep theirs.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from bi_patch.errors import BiPatchError, UnsupportedFeature
from bi_patch.ops.casts import Hold
from bi_patch.training import adapters, devices, forwards, hooks, ops
from bi_patch.training.contract import Form
from bi_patch.training.families import Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HELD = "_bi_patch"  # the attribute of each module that holds the model's state


@dataclass
class Asked:
    """What the head is to compute instead of logits: the logprobs of `tokens`, from the hidden states in `rows`.

    rows, tokens: [n] int64. chosen: a list to which each router adds its experts [rows of the batch, k], or None. The
    other fields are as in bi_patch.training.cpu.head.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    softcap: float
    chosen: list[torch.Tensor] | None = None


@dataclass
class Armed:
    """The state of an armed model.

    dtype: what all rows are computed in. parts: how many ranks of the sampler share the K of row-parallel layers.
    contract: what the sampler and this model agreed on. form: what of it chooses kernels. before: the model's own
    attention. names: the arguments of the base model's forward. functions: the operators that the layers call, by name.
    A way to compute gradients may replace them. layout: starts and lengths of the last forward's sequences. asked:
    set while the head computes logprobs. plan: the modules that were armed, the model first. casts: compiled code
    rounds as eager code does while a model or a copy of it is armed.
    """

    dtype: torch.dtype
    family: Family
    parts: int = 1
    contract: dict[str, Any] = field(default_factory=dict)
    form: Form = Form()
    before: str | None = None
    names: tuple[str, ...] = ()
    layout: tuple[torch.Tensor, torch.Tensor] | None = None
    asked: Asked | None = None
    casts: Hold = field(default_factory=Hold)
    plan: list[forwards.Planned] = field(default_factory=list, repr=False)
    functions: dict[str, Callable] = field(
        default_factory=lambda: {
            "attention": ops.attention,
            "embedding": ops.embedding,
            "experts": ops.experts,
            "gated": ops.gated,
            "head_norm": ops.head_norm,
            "head": ops.token_logprobs,
            "linear": ops.linear,
            "lora": ops.lora,
            "rms_norm": ops.rms_norm,
            "rope": ops.rope,
            "route": ops.route,
        }
    )


def unwrapped(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside the wrappers of torch.compile, DistributedDataParallel and PEFT's LoRA."""
    while (found := inside(model)) is not None:
        model = found
    return model


def inside(model: torch.nn.Module) -> torch.nn.Module | None:
    """The model inside one wrapper, or None if there is no wrapper."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        return model.module
    if type(model).__module__.startswith("peft.") and type(getattr(model, "base_model", None)).__name__ == "LoraModel":
        return model.get_base_model()
    return getattr(model, "_orig_mod", None)


def armed(model: torch.nn.Module) -> Armed | None:
    """The state of an armed model, or None if the model is not armed."""
    return vars(unwrapped(model)).get(_HELD)


def arm(model: torch.nn.Module, dtype: torch.dtype, parts: int = 1) -> Armed:
    """Give every leaf of a model the sampler's operators. Raises UnsupportedFeature for what has no cover, by name.

    dtype: what the sampler computes in. Parameters in fp32 beside another dtype are master weights. parts: the
    sampler's tensor-parallel size.
    """
    model = unwrapped(model)
    if armed(model) is not None:
        raise BiPatchError("training.arm: the model is armed already. Call disarm first")
    hooks.check_release()
    family = forwards.family_of(model)
    if family.experts and parts > 1:
        raise UnsupportedFeature(
            "training.parallel: a sampler whose ranks share experts is not repeated by the trainer. Start one without "
            "tensor parallelism"
        )
    plan = forwards.plan(model, family, dtype, parts)
    devices.prepare(next(model.parameters()).device.type)
    state = Armed(dtype, family, parts, before=model.config._attn_implementation)
    base = model.base_model
    state.names = tuple(inspect.signature(type(base).forward).parameters)[1:]
    hooks.register()
    model.set_attn_implementation(hooks.NAME)
    hooks.open_rotation(sys.modules[forwards.module_of(model)])
    state.plan = plan
    for planned in plan:
        module = planned.module
        setattr(module, _HELD, state)
        setattr(module, forwards.PARTS, planned.parts)
        if planned.forward is not None:
            module.forward = types.MethodType(planned.forward, module)
        forwards.take_frequencies(module)
    for module in {model, base}:
        setattr(module, _HELD, state)
    base._bi_patch_hook = base.register_forward_pre_hook(hooks.prepare, with_kwargs=True)
    return state


def check_unchanged(state: Armed) -> None:
    """Raise UnsupportedFeature by name if the model changed after arming: a new module, forward or hook."""
    forwards.check_unchanged(state.plan[0].module, state.plan)


def disarm(model: torch.nn.Module) -> None:
    """Give the model back as it was. Does nothing to a model that is not armed."""
    model = unwrapped(model)
    state = armed(model)
    if state is None:
        return
    model.base_model._bi_patch_hook.remove()
    del model.base_model._bi_patch_hook
    for module in model.modules():
        held = vars(module)
        held.pop(_HELD, None)
        held.pop(forwards.PARTS, None)
        forwards.return_frequencies(module)
        if getattr(held.get("forward"), "__module__", "") in (forwards.__name__, adapters.__name__):
            del module.forward
    state.casts.release()
    model.set_attn_implementation(state.before)


@contextlib.contextmanager
def asking(state: Armed, asked: Asked, config: Any) -> Iterator[None]:
    """Within the context, the model's head computes logprobs. config: the model's; its soft cap moves to the head."""
    cap = getattr(config, "final_logit_softcapping", None)
    state.asked = asked
    if cap is not None:
        config.final_logit_softcapping = None
    try:
        yield
    finally:
        state.asked = None
        if cap is not None:
            config.final_logit_softcapping = cap
