"""The embedding of tokens."""

from __future__ import annotations

import torch

from bi_patch.training.devices import define


def embedding(ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows of weight [vocabulary, C] of tokens ids [...] -> [..., C] in `dtype`."""
    return _embedding(ids.reshape(-1), weight, dtype).view(*ids.shape, weight.shape[1])


def _setup(ctx, inputs, output):
    ids, weight, _ = inputs
    ctx.save_for_backward(ids)
    ctx.vocabulary, ctx.held = weight.shape[0], weight.dtype


def _backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    return None, _embedding_backward(grad, ids, ctx.vocabulary).to(ctx.held), None


_embedding_backward = define(
    "embedding_backward(Tensor grad, Tensor ids, int vocabulary) -> Tensor",
    "embedding",
    lambda grad, ids, vocabulary: grad.new_empty(vocabulary, grad.shape[1], dtype=torch.float32),
)
_embedding = define(
    "embedding(Tensor ids, Tensor weight, ScalarType dtype) -> Tensor",
    "embedding",
    lambda ids, weight, dtype: weight.new_empty(ids.shape[0], weight.shape[1], dtype=dtype),
    _backward,
    _setup,
)
