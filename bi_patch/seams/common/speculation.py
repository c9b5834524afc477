"""Speculative decoding with model runner V1: the tokens, logprobs and draws of an engine without speculation.

vLLM's rejection sampler draws from other streams than a single step, and changes logits in another order. Here, each
row of a request (one for each draft, and one more) goes through the sampler of a step without speculation, as a request
of its own whose last tokens are the drafts before the row.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Sequence
from typing import Any

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Seam, Target


def _forward(original):
    """RejectionSampler.forward: sample every row as a step of its own, and accept the drafts that equal the draws."""
    import torch

    from bi_patch.ops import drafts

    @functools.wraps(original)
    def forward(self, metadata, draft_probs, logits, sampling_metadata):
        from vllm.v1.outputs import SamplerOutput

        counts = metadata.num_draft_tokens
        streams = drafts.Streams(sampling_metadata.generators, counts)
        sampled = self.sampler(logits=logits, sampling_metadata=_rows(sampling_metadata, metadata, streams))
        follows = drafts.inputs(metadata.draft_token_ids.to(torch.int32), counts)
        ends = metadata.cu_num_sampled_tokens
        found = drafts.check(sampled.sampled_token_ids.flatten(), follows, ends, metadata.max_spec_len)
        if streams:
            streams.keep(found.counts.tolist())
        scores = sampled.logprobs_tensors
        if scores is not None:
            at = found.rows.flatten()
            scores = scores._replace(
                logprob_token_ids=scores.logprob_token_ids[at],
                logprobs=scores.logprobs[at],
                selected_token_ranks=scores.selected_token_ranks[at],
            )
        return SamplerOutput(sampled_token_ids=found.tokens, logprobs_tensors=scores)

    return forward


def _rows(of: Any, metadata: Any, streams: dict) -> Any:
    """SamplingMetadata of the rows. of: SamplingMetadata of the requests. metadata: the SpecDecodeMetadata."""
    from bi_patch.ops import drafts

    counts = metadata.num_draft_tokens
    owner = drafts.owners(counts, metadata.draft_token_ids.device)
    first = [sum(counts[:i]) + i for i in range(len(counts))]

    def each(tensor):
        return None if tensor is None or not len(tensor) else tensor[owner]

    def by_row(held):
        if not held:
            return held
        return {first[i] + j: held[i] for i in held for j in range(counts[i] + 1)}

    follows = of.output_token_ids and (not of.no_penalties or bool(of.bad_words_token_ids))
    penalties = ("frequency_penalties", "presence_penalties", "repetition_penalties")
    return dataclasses.replace(
        of,
        temperature=each(of.temperature),
        top_p=each(of.top_p),
        top_k=each(of.top_k),
        generators=streams,
        prompt_token_ids=each(of.prompt_token_ids),
        **({} if of.no_penalties else {name: each(getattr(of, name)) for name in penalties}),
        output_token_ids=_outputs(of.output_token_ids, metadata) if follows else [],
        allowed_token_ids_mask=each(of.allowed_token_ids_mask),
        bad_words_token_ids=by_row(of.bad_words_token_ids),
        logitsprocs=_processors(of.logitsprocs, counts),
        logprob_token_ids=by_row(of.logprob_token_ids),
        spec_token_ids=None,
    )


def _outputs(of: Sequence[list[int]], metadata: Any) -> list[list[int]]:
    """The generated tokens before each row: those of its request, and the drafts before the row."""
    rest, made = iter(metadata.draft_token_ids.tolist()), []
    for tokens, count in zip(of, metadata.num_draft_tokens, strict=True):
        follow = [next(rest) for _ in range(count)]
        if -1 in follow:  # no row after such a draft counts
            follow[follow.index(-1) :] = [0] * (count - follow.index(-1))
        made += [[*tokens, *follow[:j]] for j in range(count + 1)]
    return made


def _processors(of: Any, counts: Sequence[int]) -> Any:
    """The LogitsProcessors of the rows. vLLM holds only the processor of min_tokens beside speculation.

    Raises UnsupportedFeature for another one.
    """
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor

    held = [*of.argmax_invariant, *of.non_argmax_invariant]
    other = [type(one).__name__ for one in held if type(one) is not MinTokensLogitsProcessor]
    if other:
        raise UnsupportedFeature(
            f"speculation.rows: bi_patch does not cover the logits processor {', '.join(other)} beside speculative "
            "decoding. Leave out the processor or speculative_config"
        )
    return LogitsProcessors([_min_tokens(one, counts) for one in held])


def _min_tokens(of: Any, counts: Sequence[int]) -> Any:
    """The processor of min_tokens for the rows: a row has as many more tokens as drafts come before it."""
    if not of.min_toks:
        return of
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

    added, row = [], 0
    for request, count in enumerate(counts):
        if request in of.min_toks:
            least, tokens, stops, *structured = of.min_toks[request]
            params = types.SimpleNamespace(
                min_tokens=least, all_stop_token_ids=stops, structured_outputs=True if any(structured) else None
            )
            added += [(row + j, params, None, range(len(tokens) + j)) for j in range(count + 1)]
        row += count + 1
    made = copy.copy(of)
    made.min_toks = {}
    made.update_state(BatchUpdate(batch_size=row, removed=(), added=added, moved=()))
    return made


SEAMS = (
    Seam(
        name="speculation.rows",
        targets=(Target("vllm.v1.sample.rejection_sampler", "RejectionSampler.forward", ">=0.32"),),
        close=_forward,
        why="the rejection sampler of model runner V1 draws from other streams than a step without speculation, so a "
        "seeded request gets other tokens, and its generator stands elsewhere afterwards",
        how="each row draws as a step of its own, with its request's own generator in order. A draft is accepted while "
        "it equals the draw, and the draws of rejected rows are taken back",
        until="upstream has a mode in which speculation changes no token "
        "(https://github.com/vllm-project/vllm/issues/54506)",
        causes=(22, 35),
        serves=("RejectionSampler",),
    ),
)
