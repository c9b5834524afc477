"""How many of bi_patch's functions run for each request and in each step: a bound on the host's time without noise."""

import msgspec
import pytest

from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.overhead import Calls

pytestmark = pytest.mark.engine

_OF_A_REQUEST = 40
# Of a decode step of three layers: patched layers, the sampler, and the step itself.
_OF_A_STEP = 130
# For each request of a step: the front end reads its output and makes its answer.
_OF_A_REQUEST_IN_A_STEP = 4


def calls(engine, number: int) -> Calls:
    requests = [Request(tuple(range(5 + i, 25 + i)), max_tokens=6, logprobs=2) for i in range(number)]
    return msgspec.msgpack.decode(engine.ask("calls", msgspec.msgpack.encode(requests)), type=Calls)


def test_calls_of_requests_and_steps(bf16):
    one, many = calls(bf16, 1), calls(bf16, 9)
    assert len(many.requests) == 9 and len(many.steps) >= 6
    assert 0 < max(many.requests) <= _OF_A_REQUEST, many.requests
    assert 0 < one.steps[-1] <= _OF_A_STEP, one.names
    assert many.steps[-1] - one.steps[-1] <= 8 * _OF_A_REQUEST_IN_A_STEP, many.names
