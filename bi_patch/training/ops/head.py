"""Logprobs of given tokens, from hidden states and the head's weight."""

from __future__ import annotations

import torch

from bi_patch.training.devices import define


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    softcap: float = 0.0,
    runner: str = "V2",
    processed: bool = False,
) -> torch.Tensor:
    """The logprobs of tokens [rows] under hidden [rows, C] @ weight [V, C].T -> [rows] fp32.

    temperature: [rows] fp32. top_k: [rows] int64. top_p: [rows] fp32. See bi_patch.training.cpu.head.
    """
    return _token_logprobs(hidden, weight, tokens, temperature, top_k, top_p, softcap, runner, processed)


def _setup(ctx, inputs, output):
    *tensors, ctx.softcap, ctx.runner, ctx.processed = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    of_hidden, of_weight = ctx.needs_input_grad[:2]
    form = ctx.softcap, ctx.runner, ctx.processed
    found = _token_logprobs_backward(grad, *ctx.saved_tensors, *form, of_hidden, of_weight)
    return found[0] if of_hidden else None, found[1] if of_weight else None, *[None] * 7


def _backward_fake(
    grad, hidden, weight, tokens, temperature, top_k, top_p, softcap, runner, processed, of_hidden, of_weight
):
    return (
        hidden.new_empty(hidden.shape if of_hidden else 0),
        weight.new_empty(weight.shape) if of_weight else hidden.new_empty(0),
    )


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor tokens, Tensor temperature, Tensor? top_k, Tensor? top_p, float softcap, "
    "str runner, bool processed"
)
_token_logprobs_backward = define(
    f"token_logprobs_backward(Tensor grad, {_INPUTS}, bool of_hidden, bool of_weight) -> (Tensor, Tensor)",
    "head",
    _backward_fake,
)
_token_logprobs = define(
    f"token_logprobs({_INPUTS}) -> Tensor",
    "head",
    lambda hidden, *_: hidden.new_empty(hidden.shape[0], dtype=torch.float32),
    _backward,
    _setup,
)
