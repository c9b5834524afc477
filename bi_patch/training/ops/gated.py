"""Gated activations."""

from __future__ import annotations

import torch

from bi_patch.training.devices import define


def gated(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """activation(gate) * up for gate and up [..., D]. kind: "silu", "gelu_tanh" or "gelu"."""
    return _gated(gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1]), kind).view(gate.shape)


def _setup(ctx, inputs, output):
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx, grad):
    return *_gated_backward(grad, *ctx.saved_tensors, ctx.kind), None


_gated_backward = define(
    "gated_backward(Tensor grad, Tensor gate, Tensor up, str kind) -> (Tensor, Tensor)",
    "gated",
    lambda grad, gate, up, kind: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
)
_gated = define(
    "gated(Tensor gate, Tensor up, str kind) -> Tensor",
    "gated",
    lambda gate, up, kind: gate.new_empty(gate.shape),
    _backward,
    _setup,
)
