"""Rotary embedding."""

from __future__ import annotations

import torch

from bi_patch.training.devices import define


def rope(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """x [rows, heads, D], rotated by table [rows, D]: cosines, then sines, for one half of a head each."""
    return _rope(x, table)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _backward(ctx, grad):
    return _rope_backward(grad, *ctx.saved_tensors), None


_rope_backward = define(
    "rope_backward(Tensor grad, Tensor table) -> Tensor", "rope", lambda grad, table: grad.new_empty(grad.shape)
)
_rope = define(
    "rope(Tensor x, Tensor table) -> Tensor", "rope", lambda x, table: x.new_empty(x.shape), _backward, _setup
)
