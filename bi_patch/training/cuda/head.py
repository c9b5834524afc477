"""Logprobs of given tokens on CUDA, from the last hidden states: the head, the sampler's transforms, log-softmax.

The sampler's model runner and its logprobs_mode decide which kernel sums a row, and of which dtype. Model runner V2
sums raw logits in the model's dtype, and processed logits in fp32. Rows are cut into chunks, so that logits of the
whole vocabulary exist for few rows at a time. The backward computes the logits once more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bi_patch.kernels.triton import logits_backward
from bi_patch.ops.cuda import outer
from bi_patch.training.chunks import chunked
from bi_patch.training.cuda import linear, vllm_kernels

CHUNK = 1024  # rows


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    softcap: float,
    runner: str,
    processed: bool,
) -> torch.Tensor:
    """As bi_patch.training.cpu.head, which states the shapes. runner and processed decide bits here."""
    found = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    for at, _, scores in _scored(hidden, weight, temperature, top_k, top_p, softcap, runner, processed):
        if runner == "V2":
            found[at] = vllm_kernels.token_logprobs(scores, tokens[at])
        else:
            found[at] = vllm_kernels.log_softmax(scores).gather(-1, tokens[at, None])[:, 0]
    return found


def token_logprobs_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    softcap: float,
    runner: str,
    processed: bool,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of hidden [rows, C] and of weight [V, C] (weight's dtype), from grad [rows] fp32."""
    into = torch.empty_like(hidden) if of_hidden else hidden.new_empty(0)
    total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if of_weight else None
    into_rows = row_gradients(weight, hidden.dtype) if of_hidden else None
    for at, of_logits in logit_gradients(
        grad, hidden, weight, tokens, temperature, top_k, top_p, softcap, runner, processed
    ):
        if of_hidden:
            into[at] = into_rows(of_logits)
        if total is not None:
            outer.product(of_logits, hidden[at], total, add=True)
    return into, hidden.new_empty(0) if total is None else total.to(weight.dtype)


def row_gradients(weight: torch.Tensor, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that gives the gradient of up to CHUNK rows [rows, C] from that of their logits [rows, V]."""
    turned = weight.to(dtype).t().contiguous()
    return lambda of_logits: linear.product(of_logits, turned, None, CHUNK)


def logit_gradients(grad, hidden, weight, tokens, temperature, top_k, top_p, softcap, runner, processed):
    """Yield (a slice of rows, the gradient of these rows' logits [rows, V] in hidden's dtype), rows ascending."""
    for at, logits, scores in _scored(hidden, weight, temperature, top_k, top_p, softcap, runner, processed):
        rows = grad[at].float(), scores, logits, tokens[at], temperature[at]
        yield at, logits_backward.logits(*rows, softcap, hidden.dtype)


def _scored(hidden, weight, temperature, top_k, top_p, softcap, runner, processed):
    """Yield (a slice of rows, and of these rows what `_scores` returns), rows ascending."""
    held = weight.to(hidden.dtype)
    change = not bool((temperature == 1).all())
    for at, rows, *transforms in chunked(CHUNK, hidden, temperature, top_k, top_p):
        yield at, *_scores(rows, held, *transforms, softcap, runner, processed, change)


def _scores(hidden, weight, temperature, top_k, top_p, softcap, runner, processed, change):
    """The logits of some rows, capped, in hidden's dtype; and as the sampler sums them. change: apply temperatures."""
    logits = linear.product(hidden, weight, None, CHUNK)
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    if not (processed or runner == "V1" or change or top_k is not None or top_p is not None):
        return logits, logits
    scores = logits.to(torch.float32, copy=True)
    if change:
        if runner == "V2":
            vllm_kernels.divide(scores, temperature)
        else:
            scores.div_(temperature[:, None])
    if top_k is not None or top_p is not None:
        scores = vllm_kernels.top_k_top_p(scores, top_k, top_p)
    return logits, scores
