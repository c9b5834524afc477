"""Causal attention over the sequences of a batch."""

from __future__ import annotations

import torch

from bi_patch.training.devices import define


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    backend: str = "",
) -> torch.Tensor:
    """Attention of query [rows, heads, D] to key and value [rows, kv heads, D] -> [rows, heads, D].

    starts, lengths: [sequences] int64. window: the tokens that a token sees, itself included; 0 for all. softcap: 0 for
    none. Rows outside all sequences get zeros. backend: vLLM's backend that serves the sampler's layer, or "".
    """
    return _attention(query, key, value, starts, lengths, scale, window, softcap, backend)[0]


def _fake(query, key, value, starts, lengths, scale, window, softcap, backend):
    # On CUDA, the backward takes the log of each row's sum of exponentials.
    kept = (query.shape[1], query.shape[0]) if query.device.type == "cuda" else 0
    return query.new_empty(query.shape), query.new_empty(kept, dtype=torch.float32)


def _backward_fake(grad, query, key, value, out, kept, starts, lengths, scale, window, softcap):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _setup(ctx, inputs, output):
    query, key, value, starts, lengths, ctx.scale, ctx.window, ctx.softcap, _ = inputs
    ctx.save_for_backward(query, key, value, *output, starts, lengths)


def _backward(ctx, grad, _):
    found = _attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.window, ctx.softcap)
    return *found, None, None, None, None, None, None


_attention_backward = define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor kept, Tensor starts, "
    "Tensor lengths, float scale, int window, float softcap) -> (Tensor, Tensor, Tensor)",
    "attention",
    _backward_fake,
)
_attention = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor starts, Tensor lengths, float scale, int window, "
    "float softcap, str backend) -> (Tensor, Tensor)",
    "attention",
    _fake,
    _backward,
    _setup,
)
