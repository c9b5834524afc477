"""Parts of streamed inputs: each draws with its own seed, and what vLLM keeps of the first part is the same in all."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from bi_patch.errors import UnsupportedRequest
from bi_patch.seams.common import seeds, streamed


@pytest.mark.parametrize(
    "given, said",
    [
        ({"logprobs": 1}, "logprobs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"detokenize": False, "skip_special_tokens": False}, "detokenize, skip_special_tokens"),
        ({"prompt_logprob_token_ids": np.array([[3]])}, "prompt_logprob_token_ids"),
    ],
)
def test_a_part_with_another_value_is_refused(given, said):
    with pytest.raises(UnsupportedRequest, match=f"another value of .*{said}.* than"):
        streamed.check(SamplingParams(), SamplingParams(**given))
    streamed.check(SamplingParams(**given), SamplingParams(**given, temperature=0.5, seed=3, max_tokens=9))


def test_each_parameter_is_read_anew_or_is_the_same_in_all_parts():
    assert {name for name in streamed.OF_PARTS if not hasattr(SamplingParams(), name)} == set()
    for before, part in ((None, SamplingParams()), (SimpleNamespace(logprobs=1), SamplingParams())):
        streamed.check(before, part)


def test_the_front_end_refuses_such_a_part_before_it_sends_it():
    front, seen = SimpleNamespace(request_states={}), []

    def original(self, request):
        self.request_states.setdefault(request.request_id, SimpleNamespace())
        seen.append(request.sampling_params.logprobs)

    add = seeds._of_request(original)

    def part(name, resumable=True, **given):
        add(front, SimpleNamespace(request_id=name, resumable=resumable, sampling_params=SamplingParams(**given)))

    part("a", logprobs=1)
    part("a", logprobs=1, max_tokens=4)
    part("b", logprobs=2)
    with pytest.raises(UnsupportedRequest, match="streamed.parts"):
        part("a", logprobs=2)
    part("a", resumable=False)  # vLLM's sign that no more parts come
    assert seen == [1, 1, 2, None]


def test_a_part_draws_with_its_own_seed():
    """vLLM's model runner keeps the generator of the first part."""
    kept = torch.Generator().manual_seed(1)

    def original(self, req_id, new):
        return SimpleNamespace(sampling_params=new, generator=kept)

    update, runner = streamed._drawn_anew(original), SimpleNamespace(device="cpu")
    torch.rand(3, generator=kept)  # draws of the first part
    for params, seed in ((SamplingParams(seed=7), 7), (SamplingParams(seed=1), 1)):
        made = update(runner, "name", params).generator
        assert torch.equal(torch.rand(4, generator=made), torch.rand(4, generator=torch.Generator().manual_seed(seed)))
    assert update(runner, "name", SamplingParams(temperature=0.0, seed=7)).generator is None
    assert update(runner, "name", None).generator is None
