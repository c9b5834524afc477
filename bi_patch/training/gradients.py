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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.autograd import Function

from bi_patch.errors import BiPatchError, GradientsOpen, GradientsUnordered, UnsupportedFeature
from bi_patch.training import devices, huggingface, ops
from bi_patch.training.adapters import scaled

_CALL = "bi_patch_call"  # the keyword argument that carries a call's spans and number to the layers

Spans = tuple[
    tuple[int, int], ...
]  # of each sequence in the rows of a batch: its first row, and the row after its last
# (gradient of the output [rows, ...], input [rows, ...], spans, chain): adds the gradient of each sequence, in order
Add = Callable[[torch.Tensor, torch.Tensor, Spans, torch.Tensor], None]


@dataclass(frozen=True)
class Call:
    """One forward pass of the model. number: counted from 1. spans: its sequences. rows: padding included."""

    number: int
    spans: tuple[tuple[int, int], ...]
    rows: int

    def of(self, rows: int, what: str) -> Spans:
        """The spans, for an operator that got this many rows. Raises UnsupportedFeature for another number."""
        if rows != self.rows:
            raise UnsupportedFeature(
                f"training.gradients: a {what} got {rows} rows of a batch of {self.rows}. The gradient of a sequence "
                "needs all rows of the batch: leave out logits_to_keep, or call training.logprobs"
            )
        return self.spans


@dataclass
class Gradients:
    """The chains of one `gradients` block. call: the call of the model that runs.

    chains: by parameter and use, "embedding" or "layer".
    """

    call: Call | None = None
    count: int = 0
    chains: dict[tuple[torch.nn.Parameter, str], torch.Tensor] = field(default_factory=dict)
    _last: dict[tuple[torch.nn.Parameter, str], int] = field(default_factory=dict)

    def chain(self, parameter: torch.nn.Parameter, use: str, call: Call) -> torch.Tensor:
        """The buffer to which `call` now adds. Raises GradientsUnordered if this call or a later one has added."""
        key = (parameter, use)
        last = self._last.get(key, 0)
        if call.number <= last:
            raise GradientsUnordered(
                f"training.gradients: pass {call.number} came after pass {last} at a weight of shape "
                f"{list(parameter.shape)}. Run the backward pass of each micro-batch before the next forward pass, and "
                "use each layer once in a pass"
            )
        self._last[key] = call.number
        if key not in self.chains:
            self.chains[key] = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        return self.chains[key]

    def add(self, parameter, use: str, call: Call, spans: Spans, grad, x, rule: Add) -> None:
        """Add the gradients of one call, sequence by sequence. grad, x: [rows, ...]."""
        rule(grad, x, spans, self.chain(parameter, use, call))

    def joined(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """The gradient of a parameter, fp32; None if it got none. Its chains are forgotten."""
        found = [self.chains.pop((parameter, use), None) for use in ("embedding", "layer")]
        held = [chain for chain in found if chain is not None]
        return None if not held else held[0] if len(held) == 1 else held[0] + held[1]


@contextlib.contextmanager
def gradients(model: torch.nn.Module) -> Iterator[Gradients]:
    """Within this block, backward passes of the armed `model` give gradients that do not depend on micro-batches.

    Run any number of micro-batches in the block: forward, then backward, one after the other. At its end, every
    parameter that requires a gradient has the sum in `parameter.main_grad` (fp32, the parameter's shape; None if it got
    none). Compiled code runs as eager code in the block. An fp32 parameter has it in `parameter.grad`, too. A second
    block begins anew.

    The loss must divide by a number that is known before the first micro-batch, and the order of the sequences must not
    change with the cut. Cost: 4 bytes for each element of a weight; on CPU, one product for each weight and sequence.

    Raises GradientsOpen for a block inside a block, BiPatchError for a model that is not armed, and UnsupportedFeature
    for a model that several ranks train (FSDP2, DistributedDataParallel).
    """
    state = huggingface.armed(model)
    if state is None:
        raise BiPatchError("training.gradients: the model is not armed. Call bi_patch.training.arm first")
    _refuse_wrappers(model)
    if any(isinstance(held, _Chained) for held in state.functions.values()):
        raise GradientsOpen("training.gradients: this model is in such a block already. Use one block")
    made, before = Gradients(), dict(state.functions)
    state.functions.update({name: _Chained(made, state, make) for name, make in _OPERATORS.items()})
    try:
        # A compiler would trace the chains, which are state that lives longer than a call.
        with _watched(huggingface.unwrapped(model), state, made), torch.compiler.set_stance("force_eager"):
            yield made
    finally:
        state.functions.update(before)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.main_grad = made.joined(parameter)
            if parameter.dtype == torch.float32:
                parameter.grad = parameter.main_grad
    if made.chains:
        shapes = ", ".join(str(list(parameter.shape)) for parameter, _ in made.chains)
        raise UnsupportedFeature(
            f"training.gradients: {len(made.chains)} gradients belong to no parameter of the model (shapes {shapes}). "
            "Something replaced its parameters in the block. Train without the block"
        )


def _refuse_wrappers(model: torch.nn.Module) -> None:
    """Raise UnsupportedFeature for a model whose gradients several ranks would have to add."""
    at = model
    while at is not None:
        if isinstance(at, torch.nn.parallel.DistributedDataParallel) and at.process_group.size() > 1:
            raise UnsupportedFeature(
                "training.gradients: DistributedDataParallel adds no chains, so each rank would keep gradients of its "
                "own. Train without the block, or on one rank"
            )
        at = huggingface.inside(at)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, torch.distributed.tensor.DTensor):
            raise UnsupportedFeature(
                f"training.gradients: {name} is a DTensor (FSDP2, tensor parallelism), and a part of a "
                "parameter has no chain. Train without the block"
            )


@contextlib.contextmanager
def _watched(model: torch.nn.Module, state: huggingface.Armed, made: Gradients) -> Iterator[None]:
    """Keep the call that runs. A checkpointed layer that runs a second time gets its own call again."""

    def enter(base, args, kwargs):
        given = kwargs["position_ids"]  # [batch, length], which arming's own hook has set
        starts, lengths = (x.tolist() for x in state.layout)
        made.count += torch.is_grad_enabled()
        spans = tuple((first, first + length) for first, length in zip(starts, lengths) if length)
        made.call = Call(made.count, spans, given.numel())
        return args, kwargs | {_CALL: made.call}

    def again(layer, args, kwargs):
        made.call = kwargs.pop(_CALL, made.call)
        return args, kwargs

    base = model.base_model
    layers = [module for module in base.modules() if module is not base and hasattr(module, "gradient_checkpointing")]
    handles = [base.register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [layer.register_forward_pre_hook(again, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Chained:
    """An operator of an armed model whose weights' gradients go to the chains."""

    made: Gradients
    state: huggingface.Armed
    run: Callable

    def __call__(self, *args):
        if not torch.is_grad_enabled():
            return self.run(None, None, *args)
        if self.made.call is None:
            raise GradientsOpen("training.gradients: call the model itself in the block, not one of its layers")
        return self.run(self.made, self.state, *args)


class _Tap(Function):
    """The identity of an operator's output y [rows, ...]. Backward hands the output's gradient to the chains."""

    @staticmethod
    def forward(ctx, y, x, made, call, uses):
        ctx.save_for_backward(x)
        ctx.made, ctx.call, ctx.uses = made, call, uses
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        _add(ctx, grad, *ctx.saved_tensors)
        return grad, None, None, None, None


def _add(ctx, grad: torch.Tensor, x: torch.Tensor) -> None:
    """Add what a node's parameters get: grad [rows, ...] of its output, x [rows, ...] its input."""
    spans, rows = ctx.call.of(x.shape[0], "layer"), grad.reshape(x.shape[0], -1)
    for parameter, use, rule in ctx.uses:
        ctx.made.add(parameter, use, ctx.call, spans, rows, x, rule)


def _tapped(made: Gradients | None, y, x, uses) -> torch.Tensor:
    """y, with a tap for the parameters that require gradients. x: the operator's input as [rows, ...]."""
    uses = tuple(use for use in uses if use[0] is not None and use[0].requires_grad)
    if made is None or not uses:
        return y
    return _Tap.apply(y if y.requires_grad else y.detach().requires_grad_(), x.detach(), made, made.call, uses)


class _Step(Function):
    """An operator of one input, whose parameters add to the chains in the same node that computes the input's gradient.

    run: x [rows, ...] -> y [rows, ...]. back: (gradient of y, x) -> gradient of x. parameters: for autograd only.
    """

    @staticmethod
    def forward(ctx, x, run, back, made, call, uses, *parameters):
        ctx.save_for_backward(x)
        ctx.back, ctx.made, ctx.call, ctx.uses = back, made, call, uses
        return run(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        _add(ctx, grad, x)
        of_x = ctx.back(grad, x) if ctx.needs_input_grad[0] else None
        return of_x, *[None] * (5 + len(ctx.uses))


def _stepped(made: Gradients | None, x, run, back, uses) -> torch.Tensor:
    """run(x), with chains for the parameters of `uses` that require gradients. x: [rows, ...]."""
    uses = tuple(use for use in uses if use[0] is not None and use[0].requires_grad)
    if made is None or not uses:
        return run(x)
    return _Step.apply(x, run, back, made, made.call, uses, *(use[0] for use in uses))


def _linear(made, state, x, weight, bias=None, parts=1):
    held, own = weight.detach(), None if bias is None else bias.detach()

    def run(x):
        return torch.ops.bi_training.linear(x, held, own, parts)

    def back(grad, x):
        return torch.ops.bi_training.linear_backward(grad, x, held, True, False, False)[0]

    uses = (weight, "layer", _product), (bias, "layer", _sum)
    return _stepped(made, x.reshape(-1, x.shape[-1]), run, back, uses).view(*x.shape[:-1], len(weight))


def _lora(made, state, y, x, a, b, scaling):
    flat, of_a, of_b = x.reshape(-1, x.shape[-1]), a.detach(), b.detach()
    found = ops.lora(y, x, of_a, of_b, scaling).view(-1, y.shape[-1])
    turned = scaled(of_b, x.dtype, scaling).t().contiguous()

    def into_a(grad, rows, spans, chain):
        _product(ops.linear(grad, turned), rows, spans, chain)

    def into_b(grad, rows, spans, chain):
        _product(grad.float() * scaling, ops.linear(rows, of_a).float(), spans, chain)

    return _tapped(made, found, flat, ((a, "layer", into_a), (b, "layer", into_b))).view(y.shape)


def _rms_norm(made, state, x, weight, eps, offset=0.0):
    held = weight.detach()
    return _normed(made, x, weight, eps, offset, lambda x: ops.rms_norm(x, held, eps, offset))


def _head_norm(made, state, x, weight, eps):
    held = weight.detach()
    return _normed(made, x, weight, eps, 0.0, lambda x: ops.head_norm(x, held, eps))


def _normed(made, x, weight, eps, offset, run):
    """A norm of x [..., C], or of each head of x [batch, length, heads, C]."""
    if made is None:
        return run(x)
    held, size = weight.detach(), x.shape[-1]

    def back(grad, x):
        rows = grad.reshape(-1, size), x.reshape(-1, size)
        return torch.ops.bi_training.rms_norm_backward(*rows, held, eps, offset)[0].view(x.shape)

    tokens = x.flatten(0, 1) if x.dim() == 4 else x.reshape(made.call.rows, size)
    return _stepped(made, tokens, run, back, ((weight, "layer", _norm_rule(eps)),)).view(x.shape)


def _norm_rule(eps: float) -> Add:
    def rule(grad, x, spans, chain):
        size = chain.shape[0]
        each = x[0].numel() // size if len(x) else 1  # a norm of heads has several rows for a token
        spans = spans if each == 1 else tuple((first * each, last * each) for first, last in spans)
        _chains(chain).norm(grad.reshape(-1, size), x.reshape(-1, size), eps, spans, chain)

    return rule


def _embedding(made, state, ids, weight, dtype, padding=-1):
    y = ops.embedding(ids, weight.detach(), dtype, padding)

    def rule(grad, ids, spans, chain):
        if padding >= 0:
            grad = grad.masked_fill((ids == padding)[:, None], 0)
        _chains(chain).embedding(grad, ids, spans, chain)

    return _tapped(made, y, ids.reshape(-1), ((weight, "embedding", rule),))


def _chains(chain: torch.Tensor):
    return devices.implementation(chain.device.type, "chains")


def _product(grad, x, spans, chain) -> None:
    _chains(chain).product(grad, x, spans, chain)


def _sum(grad, x, spans, chain) -> None:
    _chains(chain).column_sum(grad, spans, chain)


def _head(made, state, hidden, weight, *given):
    if made is None or not weight.requires_grad:
        return ops.token_logprobs(hidden, weight.detach(), *given)
    spans = _asked(made.call, state.asked.rows)
    return _Head.apply(hidden, weight, *given, made, made.call, spans)


def _asked(call: Call, rows: torch.Tensor) -> Spans:
    """The spans of a call's sequences among the rows of the batch that the head was asked for, ascending."""
    edges = torch.tensor(call.spans, device=rows.device)
    found = torch.searchsorted(rows, edges.reshape(-1)).view(-1, 2).tolist()
    return tuple((first, last) for first, last in found if first < last)


def _grouped(spans: Spans, most: int) -> Iterator[Spans]:
    """Parts of up to `most` rows of each sequence, cut from its first row; as many together as have `most` rows."""
    held: list[tuple[int, int]] = []
    for first, last in spans:
        for at in range(first, last, most):
            part = at, min(at + most, last)
            if held and part[1] - held[0][0] > most:
                yield tuple(held)
                held = []
            held.append(part)
    if held:
        yield tuple(held)


class _Head(Function):
    """Logprobs of given tokens. Backward adds the head's gradient to its chain, sequence by sequence."""

    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, top_k, top_p, *rest):
        *form, made, call, spans = rest  # form: softcap, runner, processed
        ctx.save_for_backward(hidden, tokens, temperature, top_k, top_p)
        ctx.weight, ctx.form, ctx.made, ctx.call, ctx.spans = weight, form, made, call, spans
        return ops.token_logprobs(hidden, weight, tokens, temperature, top_k, top_p, *form)

    @staticmethod
    def backward(ctx, grad):
        hidden, tokens, temperature, top_k, top_p = ctx.saved_tensors
        head, held = devices.implementation(hidden.device.type, "head"), ctx.weight.detach()
        into_rows = head.row_gradients(held, hidden.dtype)
        chain, of_hidden = ctx.made.chain(ctx.weight, "layer", ctx.call), torch.zeros_like(hidden)
        for spans in _grouped(ctx.spans, head.CHUNK):
            begin, at = spans[0][0], slice(spans[0][0], spans[-1][1])
            own = [None if x is None else x[at] for x in (tokens, temperature, top_k, top_p)]
            ((_, of_logits),) = head.logit_gradients(grad[at], hidden[at], held, *own, *ctx.form)
            of_hidden[at] = into_rows(of_logits)
            _product(of_logits, hidden[at], tuple((a - begin, b - begin) for a, b in spans), chain)
        return of_hidden, *[None] * 11


def _experts(made, state, x, weights, ids, gate_up, down, kind):
    if made is None or not (gate_up.requires_grad or down.requires_grad):
        return ops.experts(x, weights, ids, gate_up.detach(), down.detach(), kind)
    return _Experts.apply(x, weights, ids, gate_up, down, kind, made, made.call)


class _Experts(Function):
    """The sum of each row's experts. Backward adds the gradients of all experts sequence by sequence."""

    @staticmethod
    def forward(ctx, x, weights, ids, gate_up, down, kind, made, call):
        ctx.save_for_backward(x, weights, ids)
        ctx.experts, ctx.kind, ctx.made, ctx.call = (gate_up, down), kind, made, call
        return ops.experts(x, weights, ids, gate_up, down, kind)

    @staticmethod
    def backward(ctx, grad):
        x, weights, ids = ctx.saved_tensors
        of, held = devices.implementation(x.device.type, "experts"), [w.detach() for w in ctx.experts]
        grad = grad.contiguous()
        of_x, of_weights, _, _ = of.experts_backward(grad, x, weights, ids, *held, ctx.kind, True, False)
        spans = ctx.call.of(x.shape[0], "layer of experts")
        chains = [ctx.made.chain(w, "layer", ctx.call) if w.requires_grad else None for w in ctx.experts]
        for first, last in spans:
            own = (part[first:last].clone() for part in (grad, x, weights, ids))
            of.add_gradients(*own, *held, ctx.kind, *chains)
        return of_x, of_weights, *[None] * 6


_OPERATORS = {
    "linear": _linear,
    "lora": _lora,
    "rms_norm": _rms_norm,
    "head_norm": _head_norm,
    "embedding": _embedding,
    "experts": _experts,
    "head": _head,
}
