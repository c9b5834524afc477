"""The linear layer."""

from __future__ import annotations

import torch

from bi_patch.training.devices import define


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, parts: int = 1) -> torch.Tensor:
    """x [..., K] @ weight [N, K].T + bias [N] -> [..., N]. parts: see bi_patch.training.cpu.linear."""
    return _linear(x.reshape(-1, x.shape[-1]), weight, bias, parts).view(*x.shape[:-1], weight.shape[0])


def _fake(x, weight, bias, parts):
    return x.new_empty(x.shape[0], weight.shape[0])


def _backward_fake(grad, x, weight, of_x, of_weight, of_bias):
    return (
        x.new_empty(x.shape if of_x else 0),
        weight.new_empty(weight.shape) if of_weight else grad.new_empty(0),
        weight.new_empty(weight.shape[0]) if of_bias else grad.new_empty(0),
    )


def _setup(ctx, inputs, output):
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    asked = ctx.needs_input_grad[:3]
    found = _linear_backward(grad, x, weight, *asked)
    return *(part if need else None for part, need in zip(found, asked)), None


_linear_backward = define(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, bool of_x, bool of_weight, bool of_bias) "
    "-> (Tensor, Tensor, Tensor)",
    "linear",
    _backward_fake,
)
_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, int parts) -> Tensor", "linear", _fake, _backward, _setup
)
