"""Gradients in fp32 that do not depend on how a batch is cut into micro-batches.

Autograd sums a weight's gradient over all tokens of a micro-batch, so the cut decides the order of the sum, and every
micro-batch rounds its sum to the weight's dtype. Here each use of a weight has one fp32 buffer, the *chain*. Sequence
after sequence, in the order of the batch, the sequence's own gradient is added to the chain. A sequence's gradient
depends on the sequence alone, so each cut of the same batch adds the same numbers in the same order.

A weight with two uses, as the embedding and the head of a tied model, has two chains, which are added at the end: the
uses alternate with the micro-batches. The loss must not depend on the cut either: divide by a count of the whole
batch, such as all its tokens, never by a count of the micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.autograd import Function

from bi_patch.errors import BiPatchError, UnsupportedFeature
from bi_patch.training.layout import Spans, spans

CALL = "bi_patch_call"  # the keyword argument that carries a call's spans and number to the layers


class GradientsOpen(BiPatchError):
    """A block of `gradients` inside another of the same model, or a layer that was called without its model."""


class GradientsUnordered(BiPatchError):
    """Backward passes in another order than the forward passes, or a layer that one pass uses twice."""


# (gradient of the output [rows, ...], input [rows, ...], the chain, the module) -> None: adds one sequence's gradient
Add = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.nn.Module], None]


@dataclass(frozen=True)
class _Use:
    """One use of a parameter: a module, the parameter's name in it, and the rule that adds a sequence's gradient."""

    module: torch.nn.Module
    name: str
    parameter: torch.nn.Parameter
    add: Add


@dataclass
class Gradients:
    """The chains of one `gradients` block. spans, call: of the call of the model that runs."""

    uses: list[_Use]
    spans: Spans | None = None
    call: int = 0
    _chains: dict[_Use, torch.Tensor] = field(default_factory=dict)
    _added: dict[_Use, int] = field(default_factory=dict)

    def add(self, use: _Use, grad: torch.Tensor, x: torch.Tensor, rows: Spans, call: int) -> None:
        """Add one micro-batch, sequence by sequence. grad, x: [rows of the batch, ...]. Raises GradientsUnordered."""
        if call <= self._added.get(use, 0):
            raise GradientsUnordered(
                f"{type(use.module).__name__}: its gradient of call {call} of the model came after that of call "
                f"{self._added[use]}. Run the backward pass of each micro-batch before the next forward pass, and use "
                "each layer once in a pass"
            )
        self._added[use] = call
        chain = self._chains.get(use)
        if chain is None:
            chain = self._chains[use] = torch.zeros_like(use.parameter, dtype=torch.float32)
        for begin, end in rows.of(x.shape[0], use.module):
            # Fresh copies: a library may choose its code by the address of the first element.
            use.add(_copied(grad[begin:end]), _copied(x[begin:end]), chain, use.module)

    def joined(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        """The gradient of each parameter in fp32: its chains, added in the order of the model's modules."""
        found: dict[torch.nn.Parameter, torch.Tensor] = {}
        for use in self.uses:
            chain = self._chains.pop(use, None)
            if chain is not None:
                found[use.parameter] = found[use.parameter] + chain if use.parameter in found else chain
        return found


def _copied(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32, copy=True) if x.is_floating_point() else x


@contextlib.contextmanager
def gradients(model: torch.nn.Module) -> Iterator[Gradients]:
    """Within this block, backward passes of the armed `model` give gradients that do not depend on micro-batches.

    Run any number of micro-batches inside: forward, then backward. At the end of the block, every parameter that
    requires a gradient has the sum in `parameter.main_grad` (fp32, the parameter's shape; None if it got none), and an
    fp32 parameter has it in `parameter.grad`, too. A second block begins anew.

    The loss must divide by a number that is known before the first micro-batch. Sequences count in the order in which
    they come: the order of the batch must not change with the cut.

    Raises UnsupportedFeature for a trainable parameter without a rule, GradientsOpen for a block inside a block.
    """
    if hasattr(model, _OPEN):
        raise GradientsOpen("this model is inside a block of training.gradients already")
    uses = list(_uses(model))
    made = Gradients(uses)
    trained = list(dict.fromkeys(use.parameter for use in uses))
    with contextlib.ExitStack() as stack:
        setattr(model, _OPEN, made)
        stack.callback(delattr, model, _OPEN)
        for parameter in trained:  # so that autograd computes no second gradient of the weights
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        stack.enter_context(_seen(model, made))
        for module in dict.fromkeys(use.module for use in uses):
            own = [use for use in uses if use.module is module]
            handle = module.register_forward_hook(lambda m, args, y, own=own: _tapped(made, own, args[0], y))
            stack.callback(handle.remove)
        yield made
        found = made.joined()
    for parameter in trained:
        parameter.main_grad = found.get(parameter)
        if parameter.dtype == torch.float32:
            parameter.grad = parameter.main_grad


_OPEN = "_bi_patch_gradients"


@contextlib.contextmanager
def _seen(model: torch.nn.Module, made: Gradients) -> Iterator[None]:
    """Keep the spans of the call that runs. A checkpointed layer gets them again when it runs a second time."""
    base = getattr(model, "base_model", model)

    def enter(module, args, kwargs):
        given = kwargs.get("input_ids", args[0] if args else None)
        if given is None:
            given = kwargs["inputs_embeds"][..., 0]
        made.call += torch.is_grad_enabled()
        made.spans = spans(given.shape, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        return args, kwargs | {CALL: (made.spans, made.call)}

    def layer(module, args, kwargs):
        made.spans, made.call = kwargs.pop(CALL, (made.spans, made.call))
        return args, kwargs

    layers = [m for m in base.modules() if hasattr(m, "gradient_checkpointing") and m is not base]
    handles = [base.register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [m.register_forward_pre_hook(layer, with_kwargs=True) for m in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tapped(made: Gradients, uses: Sequence[_Use], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return y
    if made.spans is None:
        raise GradientsOpen("a layer of the model was called by itself: call the model inside training.gradients")
    anchor = y if y.requires_grad else y.detach().requires_grad_()
    return _Tap.apply(anchor, x.detach(), made, uses, made.spans, made.call)


class _Tap(Function):
    """The identity. Backward also hands the gradient of a module's output to the chains of its parameters."""

    @staticmethod
    def forward(ctx, y, x, made, uses, rows, call):
        ctx.save_for_backward(x)
        ctx.made, ctx.uses, ctx.rows, ctx.call = made, uses, rows, call
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        for use in ctx.uses:
            ctx.made.add(use, _flat(grad), _flat(x) if x.is_floating_point() else x.reshape(-1), ctx.rows, ctx.call)
        return grad, None, None, None, None, None


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[batch, length, ...] -> [batch * length, ...]; a tensor of rows stays."""
    return x.flatten(0, 1) if x.dim() > 2 else x


def _uses(model: torch.nn.Module) -> Iterator[_Use]:
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                yield _Use(module, name, parameter, _rule(path, module, name))


def _rule(path: str, module: torch.nn.Module, name: str) -> Add:
    if isinstance(module, torch.nn.Linear):
        return _linear_bias if name == "bias" else _linear
    if isinstance(module, torch.nn.Embedding):
        return _embedding
    if type(module).__name__.endswith("RMSNorm") and name == "weight":
        return _norm
    raise UnsupportedFeature(
        f"{path} ({type(module).__name__}): training.gradients has no rule for its parameter {name!r}; freeze it with "
        "requires_grad_(False), or train without training.gradients"
    )


def _linear(grad, x, chain, module) -> None:
    chain.addmm_(grad.t(), x)


def _linear_bias(grad, x, chain, module) -> None:
    chain.add_(grad.sum(0))


def _embedding(grad, ids, chain, module) -> None:
    if module.padding_idx is not None:
        kept = ids != module.padding_idx
        ids, grad = ids[kept], grad[kept]
    chain.index_add_(0, ids, grad)


def _norm(grad, x, chain, module) -> None:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    chain.add_((grad * normed).reshape(-1, x.shape[-1]).sum(0))
