"""The seams of the sampler, on stand-ins: masks of allowed tokens follow their requests."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bi_patch.seams.common import sampling


def batch(*masks):
    """A stand-in for vLLM's InputBatch: each row of the mask holds one request's number."""
    mask = torch.tensor([[m, m] for m in masks])
    return SimpleNamespace(_req_ids=list(masks), num_reqs=len(masks), allowed_token_ids_mask_cpu_tensor=mask)


def test_a_place_that_becomes_empty_has_no_mask():
    def condense(held):  # as in vLLM 0.26: the last request moves to the first place, its mask stays behind
        mask = held.allowed_token_ids_mask_cpu_tensor
        mask[0] = mask[2]
        held._req_ids[0] = held._req_ids[2]
        del held._req_ids[2:]
        held.num_reqs = 2

    held = batch(1, 2, 3)
    sampling._condense(condense)(held)
    assert held.allowed_token_ids_mask_cpu_tensor.tolist() == [[3, 3], [2, 2], [0, 0]]


def test_two_requests_swap_their_masks():
    def swap_states(held, i1, i2):  # as in vLLM 0.26: views, so that both rows end as the second
        mask = held.allowed_token_ids_mask_cpu_tensor
        mask[i1], mask[i2] = mask[i2], mask[i1]

    held = batch(1, 2, 3)
    sampling._swap_states(swap_states)(held, 0, 2)
    assert held.allowed_token_ids_mask_cpu_tensor.tolist() == [[3, 3], [2, 2], [1, 1]]


def test_an_embedding_counts_as_no_token():
    """vLLM's own InputBatch: the place in the batch holds the tokens of the request before."""
    from vllm.v1.worker.gpu_input_batch import InputBatch

    make = sampling._prompt_tokens(InputBatch._make_prompt_token_ids_cpu_tensor)
    held = SimpleNamespace(
        num_reqs=3,
        vocab_size=100,
        num_prompt_tokens=np.array([4, 3, 2]),
        token_ids_cpu=np.array([[7, 8, 9, 10], [1, 2, 3, 4], [5, 250, 6, 6]], dtype=np.int32),
        is_token_ids=np.array([[False] * 4, [True] * 4, [True, False, True, True]]),
        req_prompt_embeds={0: torch.zeros(4, 8), 2: torch.zeros(2, 8)},
    )
    assert make(held).tolist() == [[100] * 4, [1, 2, 3, 100], [5, 100, 100, 100]]
    held.req_prompt_embeds = {1: torch.zeros(3, 8), 3: torch.zeros(2, 8)}  # vLLM 0.26 keeps them: both requests ended
    assert make(held).tolist() == [[7, 8, 9, 10], [1, 2, 3, 100], [5, 250, 100, 100]]


def test_without_masks_nothing_happens():
    held = batch(1, 2)
    held.allowed_token_ids_mask_cpu_tensor = None
    sampling._condense(lambda held: held._req_ids.pop())(held)
    sampling._swap_states(lambda held, i1, i2: None)(held, 0, 1)


def test_top_logprobs_are_gathered_once_in_a_mixed_step():
    from vllm.v1.sample.sampler import Sampler

    calls = []

    class Counting(Sampler):
        @staticmethod
        def gather_logprobs(logprobs, count, token_ids):
            calls.append(count)
            return Sampler.gather_logprobs(logprobs, count, token_ids)

    logprobs = torch.randn(2, 50).log_softmax(-1)
    sampled = torch.tensor([3, 4])

    def forward(sampler, logits, metadata):  # the end of Sampler.forward: it prefers the given tokens
        specific = sampler.gather_specific_token_logprobs(logits, metadata.logprob_token_ids, sampled)
        sampler.gather_logprobs(logits, metadata.max_num_logprobs, token_ids=sampled)
        return specific

    metadata = SimpleNamespace(max_num_logprobs=2, logprob_token_ids={1: [7]})
    found = sampling._specific_logprobs(forward)(Counting(), logprobs, metadata)
    top = Sampler.gather_logprobs(logprobs, 2, token_ids=sampled)
    assert calls == [2]
    assert torch.equal(found.logprobs[0], top.logprobs[0]) and found.logprob_token_ids[1, 1] == 7


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_model_runner_v1_changes_no_bit_of_a_row_without_penalties(zero):
    """Beside a row with penalties. A penalty of -0.0 would: that is why requests.core makes it 0.0."""
    from vllm.v1.sample.ops.penalties import apply_all_penalties

    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1e-45, -1e-45, 3e38, -3e38])
    logits = torch.cat([torch.randn(2, 500), special.repeat(2, 1)], dim=1)
    vocab = logits.shape[1]
    penalties = [torch.tensor([zero, 0.5]), torch.tensor([zero, 0.5]), torch.tensor([1.0, 1.5])]
    prompt = torch.arange(vocab - 5, vocab).repeat(2, 1)
    found = apply_all_penalties(logits.clone(), prompt, *penalties, [[vocab - 7, vocab - 7, 5], [vocab - 7]])
    changed = (found.view(torch.int32) != logits.view(torch.int32))[0].nonzero().flatten()
    assert changed.tolist() == ([] if math.copysign(1, zero) > 0 else [501])  # the logit of -0.0
