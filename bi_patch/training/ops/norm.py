"""RMSNorm."""

from __future__ import annotations

import torch

from bi_patch.training.devices import define


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """RMSNorm of x [..., C] times (weight [C] + offset) -> [..., C]."""
    return _rms_norm(x.reshape(-1, x.shape[-1]), weight, eps, offset).view(x.shape)


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
