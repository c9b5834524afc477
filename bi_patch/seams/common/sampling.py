"""Seams of sampling and logprobs."""

import functools

from bi_patch.seams.model import Seam, Target
from bi_patch.seams.overlay import Overlay


def _specific_logprobs(original):
    """Sampler.forward: a request that asks for the logprobs of given tokens leaves the others their top logprobs."""

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
    """LogprobsTensors with `rows` of `given`, and the others of `top`; what is missing on the right is -inf."""
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
        why="model runner V1 gives a whole step the tokens of its requests with logprob_token_ids: others lose theirs",
        how="each row keeps what its request asked for",
        until="upstream merges them by row",
        causes=(8,),
    ),
)
