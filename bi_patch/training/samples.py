"""What a sampler returned, as one padded batch for the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bi_patch.training import contract


@dataclass(frozen=True)
class Routing:
    """How many choices of an expert were compared, how many differ, and in words the first that differs."""

    compared: int
    differing: int
    first: str = ""


@dataclass
class Batch:
    """Requests side by side, padded to the longest: B requests of up to T tokens.

    ids: [B, T] int64. attention_mask: [B, T] int64. sampled: [B, T] bool, the tokens that the sampler drew and whose
    logprobs count. logprobs: [B, T] fp32, the sampler's; 0 elsewhere. temperature, top_p: [B, 1] fp32. top_k: [B, 1]
    int64, 0 for none. not_comparable: the rows whose logprobs nobody may compare, each with the reason. experts:
    [B, T, layers, k] int16, the ids that the sampler's routers chose, -1 where nobody knows; None for a sampler without
    enable_return_routed_experts. routing: what `logprobs` found when it compared the trainer's experts with them.
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor
    sampled: torch.Tensor
    logprobs: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    not_comparable: dict[int, str] = field(default_factory=dict)
    experts: torch.Tensor | None = None
    routing: Routing | None = None


def batch(outputs: Sequence[Any], params: Any = None, *, side: str = "right", device: str = "cpu") -> Batch:
    """The batch of vLLM's RequestOutputs, one row for each completion, in their order.

    params: the SamplingParams of all requests, or a list with one for each. side: where padding goes, "right" or
    "left". Raises UnsupportedRequest for sampling parameters that the trainer does not repeat.
    """
    given = list(params) if isinstance(params, (list, tuple)) else [params] * len(outputs)
    rows, settings, reasons, chosen = [], [], {}, {}
    for output, asked in zip(outputs, given, strict=True):
        if asked is not None:
            contract.check_sampling(asked)
        for completion in output.outputs:
            reason = why_not(completion)
            if reason:
                reasons[len(rows)] = reason
            tokens = list(completion.token_ids)
            scores = (
                [] if reason else [at[token].logprob for at, token in zip(completion.logprobs, tokens, strict=True)]
            )
            if not reason and getattr(completion, "routed_experts", None) is not None:
                chosen[len(rows)] = torch.as_tensor(completion.routed_experts.astype("int16"))
            rows.append((list(output.prompt_token_ids), tokens, scores))
            settings.append(_settings(asked))
    made = _padded(rows, settings, reasons, side, device)
    if chosen:
        made.experts = _experts(made.attention_mask.cpu(), chosen).to(device)
    return made


def _experts(mask: torch.Tensor, chosen: dict[int, torch.Tensor]) -> torch.Tensor:
    """The experts of each token [B, T, layers, k], from those of each row's first tokens. mask: [B, T]."""
    made = torch.full((*mask.shape, *next(iter(chosen.values())).shape[1:]), -1, dtype=torch.int16)
    for row, ids in chosen.items():
        first = int(mask[row].argmax())
        made[row, first : first + len(ids)] = ids
    return made


def why_not(completion: Any) -> str:
    """Why a completion's logprobs cannot be compared with a trainer's, or ""."""
    if completion.finish_reason == "abort":
        return "the request was aborted"
    versions = getattr(completion, "weight_versions", None) or ()  # vLLM's own mark, if the trainer names its versions
    if len(versions) > 1 or getattr(completion, "weights_changed", False):
        return "the request ran while the weights changed"
    if completion.logprobs is None:
        return "the request asked for no logprobs"
    return ""


def _settings(asked: Any) -> tuple[float, int, float]:
    """temperature, top_k and top_p. A greedy request's logprobs have no temperature and no truncation."""
    if asked is None or asked.temperature == 0:
        return 1.0, 0, 1.0
    return asked.temperature, max(asked.top_k, 0), asked.top_p


def _padded(rows, settings, reasons, side, device) -> Batch:
    width = max((len(prompt) + len(tokens) for prompt, tokens, _ in rows), default=0)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, sampled = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
    logprobs = torch.zeros(ids.shape, dtype=torch.float32)
    for row, (prompt, tokens, scores) in enumerate(rows):
        count = len(prompt) + len(tokens)
        first = width - count if side == "left" else 0
        drawn = slice(first + len(prompt), first + count)
        ids[row, first : first + count] = torch.tensor(prompt + tokens)
        mask[row, first : first + count] = 1
        if row not in reasons:
            sampled[row, drawn] = True
            logprobs[row, drawn] = torch.tensor(scores, dtype=torch.float32)
    heat, count, share = (
        (torch.tensor(column)[:, None] for column in zip(*settings)) if settings else (torch.ones(0, 1),) * 3
    )
    moved = (x.to(device) for x in (ids, mask, sampled, logprobs, heat.float(), count.long(), share.float()))
    return Batch(*moved, reasons)
