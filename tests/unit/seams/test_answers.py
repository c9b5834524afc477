"""The OpenAI server's answers name seeds. The servers' generators are stand-ins; a real server is in tests/engine."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from bi_patch.seams.common import answers


def output(*seeds):
    completions = [SimpleNamespace(index=i, seed=seed, finish_reason="length") for i, seed in enumerate(seeds)]
    return SimpleNamespace(outputs=completions)


async def stream_of(*items):
    for item in items:
        yield item


def test_completion_choices_follow_prompts_and_answers():
    def original(self, batch, request):
        return SimpleNamespace(choices=[SimpleNamespace(index=i) for i in range(4)])

    response = answers._completion(original)(None, [output(5, 6), output(7, None)], "request")
    assert [getattr(choice, "seed", "none") for choice in response.choices] == [5, 6, 7, "none"]


@pytest.mark.parametrize("error", [False, True])
def test_chat_choices(error):
    async def original(self, request, result_generator, request_id):
        async for _ in result_generator:
            pass
        if error:
            return SimpleNamespace(error="refused")
        return SimpleNamespace(choices=[SimpleNamespace(index=i) for i in (1, 0)])

    found = answers._chat(original)(None, SimpleNamespace(n=2), stream_of(output(8, 9)), "id")
    response = asyncio.run(found)
    assert error or [choice.seed for choice in response.choices] == [9, 8]


def test_a_stream_names_the_seed_in_the_last_event_of_each_choice():
    sent = [
        {"choices": [{"index": 0, "text": 'a "finish_reason":"x"', "finish_reason": None}]},
        {"choices": [{"index": 3, "text": "é", "finish_reason": "length", "logprobs": [-0.1, 1e-9]}]},
        {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}], "usage": {"total": 2**53 - 1}},
        {"choices": [], "usage": {}},
    ]
    events = [f"data: {json.dumps(one, ensure_ascii=False, separators=(',', ':'))}\n\n" for one in sent]

    async def original(self, request, engine_inputs, result_generator):
        async for _ in result_generator:
            pass
        for event in events:
            yield event
        yield "data: [DONE]\n\n"

    async def collect():
        outputs = stream_of((0, output(4)), (1, output(None, 2**52)))
        given = answers._stream(original)(None, SimpleNamespace(n=2), ["prompt"], result_generator=outputs)
        return [event async for event in given]

    got = asyncio.run(collect())
    assert got[0] == events[0] and got[3:] == [events[3], "data: [DONE]\n\n"]
    assert json.loads(got[1][6:]) == {"choices": [{**sent[1]["choices"][0], "seed": 2**52}]}
    assert json.loads(got[2][6:]) == {"choices": [{**sent[2]["choices"][0], "seed": 4}], "usage": sent[2]["usage"]}
    assert got[1].replace(f',"seed":{2**52}', "") == events[1]
