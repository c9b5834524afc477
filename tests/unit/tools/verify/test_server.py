"""How a server's completion becomes an Answer, and which completions raise a named error."""

import math
from types import SimpleNamespace

import pytest

from bi_patch.errors import ServerFailed
from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.server import _answer, _said

REQUEST = Request((5, 6, 7), max_tokens=2, logprobs=1, prompt_logprobs=1)


def choice(*, token_ids=(8, 9), logprobs=(-1.0, -2.0), top=({"token_id:8": -1.0}, {"token_id:9": -2.0}), prompt=None):
    held = (
        None
        if logprobs is None
        else SimpleNamespace(token_logprobs=list(logprobs), tokens=["token_id:8", "token_id:9"], top_logprobs=list(top))
    )
    prompt = prompt or (None, {"6": {"logprob": -3.0}}, {"7": {"logprob": -4.0}})
    return SimpleNamespace(model_extra={"token_ids": token_ids, "prompt_logprobs": prompt}, logprobs=held, text="")


def test_only_what_the_server_said_is_kept():
    assert _said({"id": "m"}, {}, {}) == {"model": "m", "bi_patch": None}
    sign = {"version": "0.2.0"}
    assert _said({"id": "m"}, {}, {"version": "0.33.0", "bi_patch": sign}) == {"model": "m", "bi_patch": sign}
    labels = {"block_size": "128", "enable_prefix_caching": "False", "cache_dtype": "auto"}
    said = {"model": "m", "bi_patch": None, "max_model_len": 512, "block_size": 128, "prefix_caching": False}
    assert _said({"id": "m", "max_model_len": 512}, labels, {}) == said


def test_a_whole_answer():
    made = _answer(choice(), REQUEST, "http://x")
    assert (made.tokens, made.logprobs, made.prompt_logprobs) == ([8, 9], [-1.0, -2.0], [-3.0, -4.0])
    assert _answer(choice(token_ids=None), REQUEST, "http://x") == made


def test_an_entry_about_other_tokens_is_nan_as_a_local_engine_has_it():
    made = _answer(choice(prompt=(None, {"60": {"logprob": -3.0}}, {"7": {"logprob": -4.0}})), REQUEST, "http://x")
    assert math.isnan(made.prompt_logprobs[0]) and made.prompt_top[0] == [(60, -3.0)]


@pytest.mark.parametrize(
    "given",
    [
        {"logprobs": (None, -2.0)},
        {"top": ({"token_id:8": None}, {})},
        {"prompt": (None, {"6": {"logprob": None}}, {"7": {"logprob": -4.0}})},
    ],
)
def test_a_logprob_that_is_null_is_named(given):
    with pytest.raises(ServerFailed, match="http://x returns null for a logprob.*NaN"):
        _answer(choice(**given), REQUEST, "http://x")


def test_an_answer_without_tokens_is_named():
    with pytest.raises(ServerFailed, match="neither token ids nor logprobs.*return_token_ids"):
        _answer(choice(token_ids=None, logprobs=None), REQUEST, "http://x")
