"""The seams of the sampler, on stand-ins: masks of allowed tokens follow their requests."""

from types import SimpleNamespace

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


def test_without_masks_nothing_happens():
    held = batch(1, 2)
    held.allowed_token_ids_mask_cpu_tensor = None
    sampling._condense(lambda held: held._req_ids.pop())(held)
    sampling._swap_states(lambda held, i1, i2: None)(held, 0, 1)
