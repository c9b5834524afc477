"""Parts of streamed inputs: each draws with its own seed, and what vLLM keeps of the first part is the same in all."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.engine import FinishReason

from bi_patch.errors import UnsupportedRequest
from bi_patch.seams.common import arriving, seeds, streamed, weights


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


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
def test_a_streamed_input_ends_where_the_engine_core_ends_it(reason):
    """A pause aborts it, or the core refuses a part. vLLM would send the next part, which the core answers alone."""
    queue = SimpleNamespace()
    held = SimpleNamespace(streaming_input=True, queue=queue)
    front, seen = SimpleNamespace(request_states={"a": held, "b": SimpleNamespace(streaming_input=False)}), []

    def process(self, outputs):
        seen.append([self.request_states[output.request_id].streaming_input for output in outputs])
        return SimpleNamespace(reqs_to_abort=[])

    def output(name, finish):
        return SimpleNamespace(request_id=name, finish_reason=finish, trace_headers=None)

    run = seeds._from_core(process)
    assert run(front, [output("a", None)]).reqs_to_abort == []
    assert run(front, [output("a", FinishReason.LENGTH), output("b", reason)]).reqs_to_abort == []
    assert run(front, [output("a", reason)]).reqs_to_abort == ["a"]
    assert seen == [[True], [True, False], [False]]
    add = seeds._of_request(lambda *args: seen.append(args))
    del seen[:], front.request_states["a"]  # vLLM's front end forgets a finished request
    for resumable in (True, False):  # the next part, and vLLM's sign that no more parts come
        part = SimpleNamespace(request_id="a", resumable=resumable, sampling_params=SamplingParams())
        with pytest.raises(UnsupportedRequest, match="streamed.ended: .* Send all of them again"):
            add(front, part, None, None, 0, queue)
    assert seen == []
    add(front, part, None, None, 0, SimpleNamespace())  # another request of this name
    assert len(seen) == 1


def test_the_core_refuses_a_part_of_a_streamed_input_that_a_pause_aborted(monkeypatch):
    seen = []
    finish = streamed._noted(lambda self, names, status: seen.append(names))
    held = {"a": SimpleNamespace(resumable=True), "b": SimpleNamespace(resumable=False)}
    scheduler = SimpleNamespace(requests=held)

    def part(name, resumable=True):
        streamed.check_core(scheduler, SimpleNamespace(request_id=name, resumable=resumable))

    part("a")
    finish(scheduler, ["a"], "aborted")  # by its client
    part("a")
    finish(scheduler, None, "aborted")
    assert seen == [["a"], None]
    with pytest.raises(UnsupportedRequest, match="streamed.ended: .* forgot the parts before"):
        part("a")
    part("a", resumable=False)
    part("b")
    added = []
    add = weights._arrival(lambda core, request: added.append(request.request_id))
    for name in ("a", "b"):  # checked before the pause, and added after it
        core = SimpleNamespace(scheduler=scheduler)
        arriving.note(core, coming := SimpleNamespace(request_id=name, resumable=True))
        add(core, coming)
    assert added == ["b"]
    monkeypatch.setattr(streamed, "_MOST", 1)
    scheduler.requests = {"c": SimpleNamespace(resumable=True)}
    finish(scheduler, None, "aborted")
    part("a")  # ids of long ago are forgotten
    with pytest.raises(UnsupportedRequest):
        part("c")


def test_a_streamed_input_without_a_queue_ends_as_well():
    """vLLM's LLMEngine returns outputs."""
    held = SimpleNamespace(streaming_input=True, queue=None)
    assert streamed.end(held, SimpleNamespace(finish_reason=FinishReason.ABORT)) and not held.streaming_input
    assert not streamed.end(held, SimpleNamespace(finish_reason=FinishReason.ABORT))


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
