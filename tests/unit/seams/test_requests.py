"""An error names a request's unsupported parameter. bi_patch leaves all other parameters to vLLM's own validation."""

from types import SimpleNamespace

import pytest

from bi_patch.errors import UnsupportedRequest
from bi_patch.seams.common import requests


def ask(v2=False, fast_prefill=False, **parameters):
    cache = SimpleNamespace(kv_sharing_fast_prefill=fast_prefill)
    processor = SimpleNamespace(vllm_config=SimpleNamespace(use_v2_model_runner=v2, cache_config=cache))
    validate = requests._checked(lambda self, params, tasks: "passed")
    return validate(processor, SimpleNamespace(**parameters), ("generate",))


@pytest.mark.parametrize(
    "given, said",
    [
        ({"thinking_token_budget": 5}, "thinking_token_budget with model runner V1"),
        ({"prompt_logprobs": 0, "skip_reading_prefix_cache": False}, "skip_reading_prefix_cache=False"),
        ({"prompt_logprob_token_ids": [[7]], "skip_reading_prefix_cache": False}, "skip_reading_prefix_cache=False"),
        ({"v2": True, "fast_prefill": True, "prompt_logprobs": 1}, "--kv-sharing-fast-prefill"),
    ],
)
def test_it_is_refused_by_name_as_a_bad_request(given, said):
    with pytest.raises(UnsupportedRequest, match=said) as caught:
        ask(**given)
    assert isinstance(caught.value, ValueError)  # a server answers 400


@pytest.mark.parametrize(
    "given",
    [
        {},  # pooling parameters have none of these fields
        {"v2": True, "thinking_token_budget": 5},
        {"prompt_logprobs": 1, "skip_reading_prefix_cache": None},
        {"fast_prefill": True, "prompt_logprobs": None, "thinking_token_budget": None},
    ],
)
def test_all_else_passes(given):
    assert ask(**given) == "passed"
