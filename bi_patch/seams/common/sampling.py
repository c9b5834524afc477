"""Logprobs: each request gets the logprobs that it asked for."""

import functools

from bi_patch.seams.model import Seam, Target
from bi_patch.seams.overlay import Overlay


def _specific_logprobs(original):
    """Sampler.forward: keep the top logprobs of requests that share a step with a request for given tokens."""

    @functools.wraps(original)
    def forward(self, logits, sampling_metadata, *args, **kwargs):
        most = sampling_metadata.max_num_logprobs
        if not sampling_metadata.logprob_token_ids or most is None:
            return original(self, logits, sampling_metadata, *args, **kwargs)

        def by_row(logprobs, wanted, sampled):
            given = self.gather_specific_token_logprobs(logprobs, wanted, sampled)
            return _rows_from(self.gather_logprobs(logprobs, most, token_ids=sampled), given, list(wanted))

        return original(
            Overlay(self, gather_specific_token_logprobs=by_row), logits, sampling_metadata, *args, **kwargs
        )

    return forward


def _rows_from(top, given, rows: list[int]):
    """LogprobsTensors with `rows` from `given` and the other rows from `top`. Minus infinity fills shorter rows."""
    from torch.nn.functional import pad

    width = max(top.logprobs.shape[1], given.logprobs.shape[1])

    def merged(ours, theirs, fill):
        out, theirs = (pad(x, (0, width - x.shape[1]), value=fill) for x in (ours, theirs))
        out[rows] = theirs[rows]
        return out

    ids = merged(top.logprob_token_ids, given.logprob_token_ids, 0)
    return top._replace(logprob_token_ids=ids, logprobs=merged(top.logprobs, given.logprobs, float("-inf")))


SEAMS = (
    Seam(
        name="sampling.specific_logprobs",
        targets=(Target("vllm.v1.sample.sampler", "Sampler.forward"),),
        close=_specific_logprobs,
        why="if a request of the step has logprob_token_ids, model runner V1 computes only the logprobs of these "
        "tokens, and the other requests lose their top logprobs",
        how="each row keeps the logprobs that its request asked for",
        until="upstream merges the two kinds of logprobs row by row (https://github.com/vllm-project/vllm/pull/51789)",
        causes=(8,),
    ),
)
