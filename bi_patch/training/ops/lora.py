"""A LoRA adapter beside a linear layer, in the order of the sampler."""

from __future__ import annotations

import torch

from bi_patch.training.adapters import scaled
from bi_patch.training.devices import define
from bi_patch.training.ops.linear import _linear_backward, linear


def lora(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """y [..., N] + (x [..., K] @ a [rank, K].T) @ (b [N, rank] * scaling).T. See bi_patch.training.cpu.lora."""
    return _lora(y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), a, b, scaling).view(y.shape)


def _setup(ctx, inputs, output):
    _, x, a, b, ctx.scaling = inputs
    ctx.save_for_backward(x, a, b)


def _backward(ctx, grad):
    x, a, b = ctx.saved_tensors
    of_y, of_x, of_a, of_b, _ = ctx.needs_input_grad
    low, held = linear(x, a), scaled(b, x.dtype, ctx.scaling).to(b.dtype)
    of_low, of_held, _ = _linear_backward(grad, low, held, True, of_b, False)
    into_x, into_a, _ = _linear_backward(of_low, x, a, of_x, of_a, False)
    pairs = (grad, of_y), (into_x, of_x), (into_a, of_a), (of_held * ctx.scaling, of_b), (None, False)
    return tuple(part if need else None for part, need in pairs)


_lora = define(
    "lora(Tensor y, Tensor x, Tensor a, Tensor b, float scaling) -> Tensor",
    "lora",
    lambda y, x, a, b, scaling: y.new_empty(y.shape),
    _backward,
    _setup,
)
