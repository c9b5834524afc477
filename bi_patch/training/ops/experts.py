"""The choice of experts, and the experts."""

from __future__ import annotations

import torch

from bi_patch.training.devices import define


def route(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (fp32) and ids (int32) [rows, top_k] of the experts that logits [rows, experts] choose by softmax."""
    return _route(logits, top_k, renormalize)


def experts(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, kind: str
) -> torch.Tensor:
    """The weighted sum of each row's experts. Shapes as in bi_patch.training.cpu.experts."""
    return _experts(x, weights, ids, gate_up, down, kind)


def _route_fake(logits, top_k, renormalize):
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


def _route_setup(ctx, inputs, output):
    logits, _, ctx.renormalize = inputs
    ctx.save_for_backward(logits, *output)
    ctx.mark_non_differentiable(output[1])


def _route_backward_formula(ctx, grad, _):
    return _route_backward(grad, *ctx.saved_tensors, ctx.renormalize), None, None


def _setup(ctx, inputs, output):
    *tensors, ctx.kind = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    x, weights, _, gate_up, down, _ = ctx.needs_input_grad
    asked = x or weights, gate_up or down
    found = _experts_backward(grad.contiguous(), *ctx.saved_tensors, ctx.kind, *asked)
    of_x, of_weights, of_gate_up, of_down = found
    pairs = ((of_x, x), (of_weights, weights), (None, False), (of_gate_up, gate_up), (of_down, down), (None, False))
    return tuple(part if need else None for part, need in pairs)


def _backward_fake(grad, x, weights, ids, gate_up, down, kind, of_rows, of_experts):
    asked = of_rows, of_rows, of_experts, of_experts
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip((x, weights, gate_up, down), asked))


_route_backward = define(
    "route_backward(Tensor grad, Tensor logits, Tensor weights, Tensor ids, bool renormalize) -> Tensor",
    "experts",
    lambda grad, logits, weights, ids, renormalize: logits.new_empty(logits.shape),
)
_route = define(
    "route(Tensor logits, int top_k, bool renormalize) -> (Tensor, Tensor)",
    "experts",
    _route_fake,
    _route_backward_formula,
    _route_setup,
)
_experts_backward = define(
    "experts_backward(Tensor grad, Tensor x, Tensor weights, Tensor ids, Tensor gate_up, Tensor down, str kind, "
    "bool of_rows, bool of_experts) -> (Tensor, Tensor, Tensor, Tensor)",
    "experts",
    _backward_fake,
)
_experts = define(
    "experts(Tensor x, Tensor weights, Tensor ids, Tensor gate_up, Tensor down, str kind) -> Tensor",
    "experts",
    lambda x, weights, ids, gate_up, down, kind: x.new_empty(x.shape),
    _backward,
    _setup,
)
