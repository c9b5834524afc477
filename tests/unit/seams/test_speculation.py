"""The rows of a step with drafts: each is a request of its own, whose last tokens are the drafts before the row."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from bi_patch.errors import UnsupportedFeature
from bi_patch.ops import drafts
from bi_patch.seams.common import speculation
from bi_patch.seams.cuda import speculation as cuda

VOCABULARY = 12
CPU = torch.device("cpu")


def requests(**changes):
    """SamplingMetadata of two greedy requests with two generated tokens each."""
    zeros, ones = torch.zeros(2), torch.ones(2)
    held = {
        "temperature": None,
        "all_greedy": True,
        "all_random": False,
        "top_p": None,
        "top_k": None,
        "generators": {},
        "max_num_logprobs": None,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": zeros,
        "presence_penalties": zeros,
        "repetition_penalties": ones,
        "output_token_ids": [[1, 2], [3, 4]],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
    }
    return SamplingMetadata(**(held | changes))


def min_tokens(least, tokens):
    made = MinTokensLogitsProcessor(None, CPU, False)
    made.min_toks = {1: (least, tokens, {5, 6}, False)}
    return made


def rows(of, drafts):
    metadata = SpecDecodeMetadata.make_dummy(drafts, CPU)
    return speculation._rows(of, metadata, {})


def test_penalties_and_bad_words_see_the_drafts_before_a_row():
    of = requests(no_penalties=False, bad_words_token_ids={1: [[7]]}, prompt_token_ids=torch.tensor([[8], [9]]))
    made = rows(of, [[10, 11], []])
    assert made.output_token_ids == [[1, 2], [1, 2, 10], [1, 2, 10, 11], [3, 4]]
    assert made.prompt_token_ids.flatten().tolist() == [8, 8, 8, 9]
    assert made.bad_words_token_ids == {3: [[7]]}
    assert len(made.frequency_penalties) == 4
    assert rows(of, [[10, -1, 11], []]).output_token_ids[:4] == [[1, 2], [1, 2, 10], [1, 2, 10, 0], [1, 2, 10, 0, 0]]


def test_min_tokens_count_the_drafts_before_a_row():
    of = requests(logitsprocs=LogitsProcessors([min_tokens(4, [3, 4])]))
    (made,) = rows(of, [[1], [10, 11, 9]]).logitsprocs.non_argmax_invariant
    logits = made.apply(torch.zeros(6, VOCABULARY))
    masked = [row for row in range(6) if torch.isneginf(logits[row, 5])]
    assert masked == [2, 3]  # the second request has two tokens, and needs four


def test_another_processor_is_refused():
    of = requests(logitsprocs=LogitsProcessors([LogitBiasLogitsProcessor(None, CPU, False)]))
    with pytest.raises(UnsupportedFeature, match="speculation.rows: .*LogitBiasLogitsProcessor"):
        rows(of, [[1], []])


def test_drafts_are_accepted_while_they_equal_the_greedy_choice():
    logits = torch.zeros(5, VOCABULARY)
    for row, token in enumerate((4, 7, 9, 2, 3)):
        logits[row, token] = 1.0
    sampler = SimpleNamespace(sampler=Sampler())
    metadata = SpecDecodeMetadata.make_dummy([[4, 8], [2]], CPU)
    forward = speculation._forward(RejectionSampler.forward)
    found = forward(sampler, metadata, None, logits, requests(max_num_logprobs=1))
    assert found.sampled_token_ids.tolist() == [[4, 7, -1], [2, 3, -1]]
    tokens, scores = RejectionSampler.parse_output(
        found.sampled_token_ids, VOCABULARY, logprobs_tensors=found.logprobs_tensors
    )
    assert tokens == [[4, 7], [2, 3]] and scores.logprob_token_ids[:, 0].tolist() == [4, 7, 2, 3]


def test_model_runner_v2(monkeypatch):
    def reference(drawn, inputs, edges, most):
        checked = drafts.check(drawn, inputs, edges[1:], most)
        return checked.tokens, checked.counts.int()

    monkeypatch.setattr("bi_patch.ops.cuda.drafts.check", reference)  # a launch; test_interpreter.py compares the two
    drawn = torch.tensor([4, 7, 9, 2, 3])
    sampler = SimpleNamespace(sample=lambda *args, **kwargs: (drawn, "processed"))
    held = SimpleNamespace(watermark_key=None, sampler=sampler, num_speculative_steps=3)
    inputs = torch.tensor([1, 4, 8, 1, 2], dtype=torch.int32)  # a request's first row follows its own last token
    verify = cuda._verify(lambda self: None)
    ends = torch.tensor([0, 3, 5], dtype=torch.int32)
    processed, tokens, counts = verify(held, None, None, inputs, None, ends, *[None] * 5, inputs)
    assert processed == "processed" and counts.tolist() == [2, 2] and counts.dtype == torch.int32
    assert tokens.tolist() == [[4, 7, -1, -1], [2, 3, -1, -1]]
    held.watermark_key = 1
    with pytest.raises(UnsupportedFeature, match="speculation.cuda_rows: .*watermarks"):
        verify(held, None, None, inputs, None, ends, *[None] * 5, inputs)
