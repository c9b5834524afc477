"""RMSNorm."""

from __future__ import annotations

import torch

from bi_patch.training.devices import define


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """RMSNorm of x [..., C] times (weight [C] + offset) -> [..., C]."""
    return _rms_norm(x.reshape(-1, x.shape[-1]), weight, eps, offset).view(x.shape)


def head_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of each head of x [..., heads, D] times weight [D], as a sampler that norms and rotates in one kernel."""
    return _head_norm(x.reshape(-1, *x.shape[-2:]), weight, eps).view(x.shape)


def _head_setup(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _head_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    of_x, of_weight = _rms_norm_backward(grad.reshape(-1, x.shape[-1]), x.flatten(0, 1), weight, ctx.eps, 0.0)
    found = of_x.view(x.shape), of_weight
    return *(part if need else None for part, need in zip(found, ctx.needs_input_grad)), None


def _setup(ctx, inputs, output):
    x, weight, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    found = _rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.offset)
    return *(part if need else None for part, need in zip(found, ctx.needs_input_grad)), None, None


_rms_norm_backward = define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)",
    "norm",
    lambda grad, x, weight, eps, offset: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
_rms_norm = define(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor",
    "norm",
    lambda x, weight, eps, offset: x.new_empty(x.shape),
    _backward,
    _setup,
)
_head_norm = define(
    "head_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    "norm",
    lambda x, weight, eps: x.new_empty(x.shape),
    _head_backward,
    _head_setup,
)
