"""The embedding of tokens."""

from __future__ import annotations

import torch

from bi_patch.training.devices import define


def embedding(ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, padding: int = -1) -> torch.Tensor:
    """The rows of weight [vocabulary, C] of tokens ids [...] -> [..., C] in `dtype`.

    padding: a token whose row gets no gradient, as torch.nn.Embedding's padding_idx; -1 for none.
    """
    return _embedding(ids.reshape(-1), weight, dtype, padding).view(*ids.shape, weight.shape[1])


def _setup(ctx, inputs, output):
    ids, weight, _, ctx.padding = inputs
    ctx.save_for_backward(ids)
    ctx.vocabulary, ctx.held = weight.shape[0], weight.dtype


def _backward(ctx, grad):
    (ids,) = ctx.saved_tensors
    found = _embedding_backward(grad, ids, ctx.vocabulary)
    if ctx.padding >= 0:
        found[ctx.padding] = 0
    return None, found.to(ctx.held), None, None


_embedding_backward = define(
    "embedding_backward(Tensor grad, Tensor ids, int vocabulary) -> Tensor",
    "embedding",
    lambda grad, ids, vocabulary: grad.new_empty(vocabulary, grad.shape[1], dtype=torch.float32),
)
_embedding = define(
    "embedding(Tensor ids, Tensor weight, ScalarType dtype, int padding) -> Tensor",
    "embedding",
    lambda ids, weight, dtype, padding: weight.new_empty(ids.shape[0], weight.shape[1], dtype=dtype),
    _backward,
    _setup,
)
