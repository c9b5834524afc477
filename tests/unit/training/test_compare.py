"""The comparison of logprobs, and the batch of a sampler's answers."""

from types import SimpleNamespace

import msgspec
import pytest
import torch

from bi_patch import training
from bi_patch.errors import ParityBroken, UnsupportedRequest


class Params(msgspec.Struct):
    """As vLLM's SamplingParams."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    logprobs: int | None = None


def answer(prompt, tokens, *, finish_reason="length", logprobs=True, **more):
    scores = [{token: SimpleNamespace(logprob=-token / 8)} for token in tokens] if logprobs else None
    done = SimpleNamespace(token_ids=tokens, logprobs=scores, finish_reason=finish_reason, **more)
    return SimpleNamespace(prompt_token_ids=prompt, outputs=[done])


def test_a_batch_of_answers():
    params = [Params(temperature=0.5, top_k=7), Params(temperature=0.0, top_p=0.5)]
    outputs = [answer([1, 2], [3, 4, 5]), answer([6], [7])]
    found = training.batch(outputs, params, side="left")
    assert found.ids.tolist() == [[1, 2, 3, 4, 5], [0, 0, 0, 6, 7]]
    assert found.attention_mask.tolist() == [[1] * 5, [0, 0, 0, 1, 1]]
    assert found.sampled.tolist() == [[False, False, True, True, True], [False] * 4 + [True]]
    assert found.logprobs[0].tolist() == [0, 0, -3 / 8, -4 / 8, -5 / 8]
    assert found.temperature.tolist() == [[0.5], [1.0]]  # greedy logprobs are not scaled
    assert found.top_k.tolist() == [[7], [0]] and found.top_p.tolist() == [[1.0], [1.0]]
    assert training.batch(outputs).ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]


def test_rows_that_nobody_may_compare():
    outputs = [
        answer([1], [2, 3]),
        answer([1], [2], finish_reason="abort"),
        answer([1], [2, 3], weight_versions=["step 1", "step 2"]),
        answer([1], [2, 3], logprobs=False),
        answer([1], [2, 3], weights_changed=True),
    ]
    found = training.batch(outputs)
    assert {row: reason.split()[-1] for row, reason in found.not_comparable.items()} == {
        1: "aborted",
        2: "changed",
        3: "logprobs",
        4: "changed",
    }
    compared = training.compare(torch.where(found.sampled, found.logprobs, 9.0), found)
    assert compared.compared == 2 and compared.exact and "4 rows not comparable" in str(compared)


def test_the_first_difference():
    theirs = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    ours = theirs.clone()
    ours[1, 0] = torch.nextafter(ours[1, 0], torch.tensor(0.0))
    found = training.compare(ours, theirs)
    assert (found.compared, found.differing, found.first) == (4, 1, (1, 0)) and 0 < found.worst < 1e-6
    assert not found.exact and "1 of 4 logprobs differ, first in row 1 at position 0" in str(found)
    with pytest.raises(ParityBroken, match="1 of 4"):
        training.compare(ours, theirs, strict=True)
    assert training.compare(ours, theirs, torch.tensor([[1, 1], [0, 1]])).exact
    with pytest.raises(ParityBroken, match="nothing to compare"):
        training.compare(ours, theirs, torch.zeros(2, 2), strict=True)
    with pytest.raises(ValueError, match="cannot compare"):
        training.compare(ours[:1], theirs)


def test_sampling_parameters_that_the_trainer_repeats():
    training.batch([answer([1], [2])], Params(temperature=0.7, top_k=5, top_p=0.9, seed=3, logprobs=0))
    with pytest.raises(UnsupportedRequest, match="min_p=0.1"):
        training.batch([answer([1], [2])], Params(min_p=0.1))
