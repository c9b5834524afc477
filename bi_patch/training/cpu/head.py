"""Logprobs of given tokens on CPU, from the last hidden states: the head, the sampler's transforms, log-softmax.

The rows are cut into chunks, so that logits of the whole vocabulary exist for few rows at a time. The backward computes
the logits once more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bi_patch.ops.cpu import top_k_top_p
from bi_patch.training.chunks import chunked

CHUNK = 64  # rows: the certificates of log_softmax cover this many, whatever the vocabulary


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
    """The logprob of tokens [rows] (int64) under the logits hidden @ weight.T. Returns [rows] fp32.

    hidden: [rows, C]. weight: [V, C]. temperature: [rows] fp32, 1 for a row that is not scaled. top_k: [rows] int64, V
    for a row without top-k, or None. top_p: [rows] fp32, 1 for a row without top-p, or None. softcap: the model's own
    cap of logits, 0 for none. A token that truncation drops has the logprob minus infinity. runner: the sampler's, "V1"
    or "V2". processed: whether the sampler sums logits after its transforms. Both decide bits on CUDA only.
    """
    found = hidden.new_empty(len(hidden), dtype=torch.float32)
    for at, _, scores in _scored(hidden, weight, temperature, top_k, top_p, softcap):
        found[at] = scores.log_softmax(-1, dtype=torch.float32).gather(-1, tokens[at, None])[:, 0]
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
    total = torch.zeros(weight.shape, dtype=torch.float32) if of_weight else None
    into_rows = row_gradients(weight, hidden.dtype) if of_hidden else None
    for at, of_logits in logit_gradients(
        grad, hidden, weight, tokens, temperature, top_k, top_p, softcap, runner, processed
    ):
        if of_hidden:
            into[at] = into_rows(of_logits)
        if total is not None:
            total += of_logits.float().t() @ hidden[at].float()
    return into, hidden.new_empty(0) if total is None else total.to(weight.dtype)


def row_gradients(weight: torch.Tensor, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that gives the gradient of rows [rows, C] from that of their logits [rows, V]."""
    vocabulary, size = weight.shape
    packed = torch.ops.bi_cpu.gemm_pack(weight.to(dtype).t().contiguous())
    return lambda of_logits: torch.ops.bi_cpu.gemm(of_logits, packed, size, vocabulary, None)


def logit_gradients(grad, hidden, weight, tokens, temperature, top_k, top_p, softcap, runner, processed):
    """Yield (a slice of rows, the gradient of these rows' logits [rows, V] in hidden's dtype), rows ascending."""
    for at, logits, scores in _scored(hidden, weight, temperature, top_k, top_p, softcap):
        g = grad[at, None].float()
        of_scores = scores.softmax(-1, dtype=torch.float32).mul_(-g)
        of_scores.scatter_add_(-1, tokens[at, None], g)
        of_scores.div_(temperature[at, None])
        if softcap:
            of_scores.mul_(1 - (logits.float() / softcap).square())
        yield at, of_scores.to(hidden.dtype)


def _scored(hidden, weight, temperature, top_k, top_p, softcap):
    """Yield (a slice of rows, and of these rows what `_scores` returns), rows ascending."""
    packed = torch.ops.bi_cpu.gemm_pack(weight.to(hidden.dtype))
    for at, rows, *transforms in chunked(CHUNK, hidden, temperature, top_k, top_p):
        yield at, *_scores(rows, packed, weight.shape, *transforms, softcap)


def _scores(hidden, packed, shape, temperature, top_k, top_p, softcap):
    """The logits of some rows, capped, in hidden's dtype; and in fp32 as the sampler transforms them."""
    logits = torch.ops.bi_cpu.gemm(hidden, packed, *shape, None)
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    scores = logits.float()
    if not bool((temperature == 1).all()):
        scores = scores / temperature[:, None]  # as vLLM divides: by a tensor, not by a number
    elif scores is logits:
        scores = scores.clone()
    return logits, top_k_top_p.mask(scores, top_k, top_p)
