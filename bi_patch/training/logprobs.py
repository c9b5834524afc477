"""Logprobs of an armed model: the sampler's formula, at the tokens of a batch in any form."""

from __future__ import annotations

import torch

from bi_patch.errors import BiPatchError, ContractBroken, UnsupportedRequest
from bi_patch.training import forwards, huggingface, layout, routing
from bi_patch.training.samples import Batch

Number = float | torch.Tensor


def logprobs(
    model: torch.nn.Module,
    ids: torch.Tensor | Batch,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    temperature: Number = 1.0,
    top_k: int | torch.Tensor = 0,
    top_p: Number = 1.0,
) -> torch.Tensor:
    """The logprob of each token of a batch, given the tokens before it, with the sampler's bits and with gradients.

    ids: [B, T] int64. attention_mask: a padding mask [B, T], padded on any side. A packed batch has position_ids [B, T]
    that begin anew at 0, or cu_seqlens [sequences + 1] int, and then ids may be [T]. temperature, top_k (0: none),
    top_p: a number, or a tensor that expands to ids' shape, with which the tokens were sampled. They count for a
    sampler with logprobs_mode="processed_logprobs" only. A Batch in the place of ids brings its mask and transforms.
    If it brings the sampler's experts, the trainer's are compared with them, and `compare` tells what was found.

    Returns fp32 of ids' shape. Padding and the first token of each sequence have no logprob, and get 0. A token that
    top-k or top-p drops gets minus infinity. Rows are computed without padding, so padding costs nothing.
    Raises UnsupportedRequest for a mask or positions that a sampler never sees, and ContractBroken for a temperature or
    truncation that the sampler's logprobs do not show.
    """
    state = huggingface.armed(model)
    if state is None:
        raise BiPatchError("training.logprobs: the model is not armed. Call bi_patch.training.arm first")
    huggingface.check_unchanged(state)
    held = None
    if isinstance(ids, Batch):
        given, ids, attention_mask = ids, ids.ids, ids.attention_mask
        held = given if given.experts is not None and state.family.experts else None
        if state.contract.get("logprobs_mode") != "raw_logprobs":
            temperature, top_k, top_p = given.temperature, given.top_k, given.top_p
    batch = ids if ids.ndim == 2 else ids[None]
    flat = batch.reshape(-1)
    starts, lengths = _layout(batch, attention_mask, position_ids, cu_seqlens)
    own = None if position_ids is None else position_ids.expand(batch.shape).reshape(-1)
    beside = None if cu_seqlens is None else attention_mask
    layout.positions(starts, lengths, len(flat), own, beside)  # checks all
    rows = layout.rows_of(starts, lengths)
    ends = lengths.cumsum(0)
    begins = ends - lengths
    last = torch.zeros(len(rows), dtype=torch.bool, device=ids.device)
    last[ends[lengths > 0] - 1] = True
    asked = (~last).nonzero()[:, 0]  # in packed rows, each row whose next token belongs to its sequence
    targets = rows[asked + 1]
    found = torch.zeros(flat.shape, dtype=torch.float32, device=ids.device)
    if not len(asked):
        return found.view(ids.shape)
    config = huggingface.unwrapped(model).config
    transforms = _transforms(state, config.vocab_size, targets, ids.shape, temperature, top_k, top_p)
    softcap = getattr(config, "final_logit_softcapping", None) or 0.0
    request = huggingface.Asked(asked, flat[targets], *transforms, softcap, None if held is None else [])
    cumulative = torch.cat((begins, ends[-1:])).to(torch.int32)
    with huggingface.asking(state, request, config):
        out = model(input_ids=flat[rows][None], cu_seq_lens_q=cumulative, use_cache=False)
    if held is not None:
        held.routing = routing.compare(request.chosen, held.experts, rows, forwards.routers(state.plan))
    return found.index_copy(0, targets, out.logits).view(ids.shape)


def _layout(batch, attention_mask, position_ids, cu_seqlens):
    if attention_mask is not None and attention_mask.shape != batch.shape:
        raise UnsupportedRequest("training.mask: the attention mask is no padding mask. Give one of ids' shape [B, T]")
    if cu_seqlens is not None:
        return layout.cumulative(cu_seqlens.to(batch.device))
    if attention_mask is not None:
        return layout.padded(attention_mask)
    if position_ids is not None:
        return layout.packed(position_ids.expand(batch.shape))
    return layout.full(*batch.shape, batch.device)


def _transforms(state, vocabulary, targets, shape, temperature, top_k, top_p):
    """temperature, top_k and top_p of each target, as the head takes them."""

    def spread(x, dtype):
        given = torch.as_tensor(x, dtype=dtype, device=targets.device)
        return given.expand(shape).reshape(-1)

    heat = spread(temperature, torch.float32)[targets].contiguous()
    count, share = spread(top_k, torch.int64)[targets], spread(top_p, torch.float32)[targets]
    asked = ((count > 0) & (count < vocabulary)).any(), (share < 1).any(), (heat <= 0).any(), (heat != 1).any()
    bounded, cut, cold, changed = torch.stack(asked).tolist()
    if cold:
        raise UnsupportedRequest("training.logprobs: a temperature is not above 0. Give 1 for a greedy request")
    mode = state.contract.get("logprobs_mode")
    if mode == "raw_logprobs" and (bounded or cut or changed):
        raise ContractBroken(
            "training.logprobs: the sampler's logprobs_mode is raw_logprobs, so its logprobs show no temperature and "
            "no truncation. Start the sampler with logprobs_mode='processed_logprobs', or leave them out here"
        )
    kept = count.where((count > 0) & (count < vocabulary), vocabulary)
    return heat, kept if bounded else None, share.contiguous() if cut else None
