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

        top = functools.cache(self.gather_logprobs)  # by_row needs it, and the original asks again for the same

        def by_row(logprobs, wanted, sampled):
            given = self.gather_specific_token_logprobs(logprobs, wanted, sampled)
            return _rows_from(top(logprobs, most, token_ids=sampled), given, list(wanted))

        sampler = Overlay(self, gather_specific_token_logprobs=by_row, gather_logprobs=top)
        return original(sampler, logits, sampling_metadata, *args, **kwargs)

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


def _condense(original):
    """InputBatch.condense: forget the allowed tokens of the places that it leaves empty."""

    @functools.wraps(original)
    def condense(self, *args, **kwargs):
        before = len(self._req_ids)
        result = original(self, *args, **kwargs)
        mask = self.allowed_token_ids_mask_cpu_tensor
        if mask is not None:
            mask[self.num_reqs : before] = False
        return result

    return condense


def _swap_states(original):
    """InputBatch.swap_states: swap the allowed tokens of two requests."""

    @functools.wraps(original)
    def swap_states(self, i1, i2):
        mask = self.allowed_token_ids_mask_cpu_tensor
        swapped = None if mask is None else mask[[i2, i1]]  # upstream swaps two views, and so copies the second
        original(self, i1, i2)
        if mask is not None:
            mask[[i1, i2]] = swapped

    return swap_states


def _prompt_tokens(original):
    """InputBatch._make_prompt_token_ids_cpu_tensor: an embedding is no token. vLLM's number for none is vocab_size."""

    @functools.wraps(original)
    def _make_prompt_token_ids_cpu_tensor(self):
        made = original(self)
        for row in self.req_prompt_embeds:
            if row >= len(made):  # before 0.32, vLLM keeps the embeddings of a request that has ended
                continue
            length = self.num_prompt_tokens[row]
            made[row, :length].numpy()[~self.is_token_ids[row, :length]] = self.vocab_size
        return made

    return _make_prompt_token_ids_cpu_tensor


_BATCH = "vllm.v1.worker.gpu_input_batch"


_MASKS = "upstream clears and swaps the masks of moved requests, as it does from 0.32 on"


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
    Seam(
        name="sampling.prompt_tokens",
        targets=(Target(_BATCH, "InputBatch._make_prompt_token_ids_cpu_tensor"),),
        close=_prompt_tokens,
        why="model runner V1 writes no tokens for a prompt of embeddings. A repetition penalty then counts the tokens "
        "of an earlier request, which had the same place in the batch",
        how="a position with an embedding counts as no token",
        until="upstream leaves embeddings out of the tokens that penalties count",
        causes=(8,),
    ),
    Seam(
        name="sampling.allowed_tokens_left",
        targets=(Target(_BATCH, "InputBatch.condense", "<0.32"),),
        close=_condense,
        why="if a request with allowed_token_ids moves up in the batch, model runner V1 leaves its mask behind. The "
        "next request in that place gets the mask",
        how="bi_patch clears the masks of the places that become empty",
        until=_MASKS,
        causes=(27,),
    ),
    Seam(
        name="sampling.allowed_tokens_swapped",
        targets=(Target(_BATCH, "InputBatch.swap_states", "<0.32"),),
        close=_swap_states,
        why="if two requests change places in the batch, model runner V1 gives both the allowed_token_ids of the "
        "second request",
        how="each request keeps its own mask",
        until=_MASKS,
        causes=(27,),
    ),
)
