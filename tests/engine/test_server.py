"""`bi-patch run -- vllm serve` on loopback: every process is armed, and concurrent clients get the answers that they
get alone."""

import asyncio
import os
import random
import signal

import pytest
from openai import BadRequestError
from unhurried import QUICK
from unhurried import client as client_of

from bi_patch.errors import ServerFailed
from bi_patch.tools.models import recipes
from bi_patch.tools.verify import report
from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.measure import Watcher, verify
from bi_patch.tools.verify.server import ServerEngine
from bi_patch.tools.verify.system import RunningServer

pytestmark = pytest.mark.engine

OPTIONS = (
    *("--max-model-len", "2048", "--max-num-batched-tokens", "256", "--enforce-eager"),
    *("--chat-template", "{{ messages[0]['content'] }}"),
)


@pytest.fixture(scope="module")
def server(model, serve):
    """(base URL, model, process id, log file) of a server whose engine core and worker run in their own processes."""
    folder = model(recipes.QWEN3)
    with serve(folder, *OPTIONS) as made:
        yield f"{made.url}/v1", folder, made.pid, made.log


def test_every_process_of_the_tree_is_armed(server):
    import psutil

    tree = [psutil.Process(server[2]), *psutil.Process(server[2]).children(recursive=True)]
    engines = [p for p in tree if "VLLM::" in p.name() or "VLLM::" in " ".join(p.cmdline())]
    assert len(engines) >= 2, [p.cmdline() for p in tree]
    # Process titles overwrite the environment that /proc shows. So look at the loaded libraries: arming loads wrapt.
    loaded = {p.pid: " ".join(m.path for m in p.memory_maps()) for p in [tree[0], *engines]}
    assert all("/wrapt/" in paths for paths in loaded.values()), {pid: "/wrapt/" in m for pid, m in loaded.items()}
    assert any("bi_cpu" in paths for paths in loaded.values()), "no worker has the bundled kernels loaded"


def test_concurrent_answers_equal_solo_answers(server):
    url, folder, *_ = server
    source = random.Random(5)
    prompts = [[source.randrange(1900) for _ in range(n)] for n in (3, 17, 40, 150, 290, 700, 5, 64, 257, 1200, 31, 9)]
    kinds = [
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0.7, "top_p": 0.95, "seed": 11, "logprobs": 2},
        {"temperature": 0, "logprobs": 0, "extra_body": {"prompt_logprobs": 1}},
    ]

    async def ask(client, prompt, kind, delay=0.0):
        await asyncio.sleep(delay)
        answer = await client.completions.create(model=folder, prompt=prompt, max_tokens=12, **kind)
        choice = answer.choices[0]
        return (
            choice.text,
            choice.logprobs.token_logprobs,
            choice.logprobs.top_logprobs,
            getattr(choice, "prompt_logprobs", None),
        )

    async def main():
        async with client_of(url) as client:
            asked = [(p, kinds[i % 3]) for i, p in enumerate(prompts * 2)]
            solo = [await ask(client, p, k) for p, k in asked]
            together = await asyncio.gather(
                *(ask(client, p, k, source.random()) for p, k in asked),
                *(
                    ask(
                        client,
                        [source.randrange(1900) for _ in range(source.choice((4, 50, 300)))],
                        kinds[0],
                        source.random(),
                    )
                    for _ in range(30)
                ),
            )
            return solo, together[: len(asked)]

    solo, together = asyncio.run(main())
    assert len(solo) == 24 and solo == together


def test_echoed_logprobs_are_those_of_the_request_alone(server):
    """vLLM 44106: the prompt's own logprobs, by `echo`. In the thread, model runner V2 gave an error."""
    url, folder, *_ = server
    source = random.Random(9)
    prompts = [[source.randrange(1900) for _ in range(n)] for n in (3, 40, 290, 17, 150, 9)]

    async def ask(client, prompt):
        answer = await client.completions.create(
            model=folder, prompt=prompt, max_tokens=4, temperature=0, logprobs=2, echo=True
        )
        return answer.choices[0].logprobs.token_logprobs, answer.choices[0].logprobs.top_logprobs

    async def main():
        async with client_of(url) as client:
            solo = [await ask(client, prompt) for prompt in prompts]
            return solo, await asyncio.gather(*(ask(client, prompt) for prompt in prompts * 3))

    solo, together = asyncio.run(main())
    assert [len(logprobs) for logprobs, _ in solo] == [len(prompt) + 4 for prompt in prompts]
    assert solo * 3 == together


def test_256_clients_get_their_solo_answers(server):
    """`bi-patch verify --url` with mixed lengths, arrival times and sampling, on a cold and then on a warm cache."""
    axes = (
        "concurrent clients",
        "prefix cache",
        "aborts and stops",
        "logprobs in any order",
        "structured output",
        "chunk budget",
        "restart",
    )
    found = verify(RunningServer(server[0]), QUICK, only=axes, clients=256)
    states = {axis.name: axis.state for axis in found.axes if axis.name in axes}
    assert found.exit_code == report.INVARIANT, found.verdict
    assert found.options is None and found.starts == 0 and not found.device, "nothing that the server did not say"
    sign, logged = found.served["bi_patch"], server[3].read_text()
    assert sign["platform"] == "cpu" and sign["closed"] == sign["seams"] > 0 and sign["certificates"]["passed"] > 0
    assert sum(sign["linears"].values()) > 0 and {name.split()[-2] for name in sign["linears"]} == {"bundled"}
    assert {name.split()[-1] for name in sign["linears"]} == {sign["contract"]["kernels"].split("-")[1]}
    assert sign["contract"]["digest"] == sign["digest"] and set(sign["contract"]["attention"].values()) == {"CPU_ATTN"}
    assert f"it is armed: bi_patch {sign['version']}, digest {sign['digest'][:12]}" in " ".join(found.verdict)
    for place in ("(engine core)", "(front end, as its engine core says)"):
        assert f"digest {sign['digest'][:12]} {place}" in logged
    assert found.served["model"] == server[1] and found.served["max_model_len"] > 0 and found.vllm
    assert states["chunk budget"] == states["restart"] == report.NOT_APPLICABLE
    clients = next(axis for axis in found.axes if axis.name == "concurrent clients")
    assert clients.state == report.PASSED and clients.pairs == 512 and clients.compared > 10_000


def test_unseeded_answers_name_their_seeds_and_can_be_replayed(server):
    """Completions and chat, whole and streamed, with two answers to each request, beside one another."""
    url, folder, *_ = server
    asked = {"model": folder, "temperature": 1.0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}

    async def complete(client, stream, **given):
        made = await client.completions.create(prompt=[5, 6, 7], stream=stream, **asked, **given)
        return await read(made, stream, lambda choice: choice.text)

    async def chat(client, stream, **given):
        messages = [{"role": "user", "content": "the cat"}]
        made = await client.chat.completions.create(messages=messages, stream=stream, **asked, **given)
        part = "delta" if stream else "message"
        return await read(made, stream, lambda choice: getattr(choice, part).content or "")

    async def read(made, stream, text):
        """The text and the seed of each answer."""
        if not stream:
            return [(text(choice), choice.seed) for choice in made.choices]
        texts, seeds = {}, {}
        async for event in made:
            for choice in event.choices:
                texts[choice.index] = texts.get(choice.index, "") + text(choice)
                assert choice.finish_reason is None or choice.seed is not None
                if choice.finish_reason:
                    seeds[choice.index] = choice.seed
        return [(texts[i], seeds[i]) for i in sorted(texts)]

    async def main():
        async with client_of(url) as client:
            kinds = [(ask, stream) for ask in (complete, chat) for stream in (False, True)] * 2
            together = await asyncio.gather(*(ask(client, stream, n=2) for ask, stream in kinds))
            for (ask, stream), answers in zip(kinds, together):
                (_, first), (_, second) = answers
                assert second == first + 1
                for answer in answers:
                    assert await ask(client, not stream, seed=answer[1]) == [answer]
            drawn = [seed for answers in together for _, seed in answers]
            assert len(set(drawn)) == len(drawn) == 16
            with pytest.raises(BadRequestError, match="more than 64 bits"):
                await complete(client, False, seed=2**63 - 1, n=2)

    asyncio.run(main())


def test_a_server_that_refuses_or_is_down_is_named(server):
    with ServerEngine(server[0]) as engine:
        assert engine.alive() and engine.info.block_size > 0 and engine.counters()
        with pytest.raises(ServerFailed, match="400"):
            engine.generate([Request((1, 2), prompt_logprobs=10_000)])
        assert len(engine.generate([Request((1, 2), max_tokens=3)])[0].tokens) == 3
    found = verify(RunningServer(server[0], model="another"), QUICK)
    assert found.exit_code == report.UNCHECKED and "does not serve 'another'" in found.stopped
    found = verify(RunningServer("http://127.0.0.1:9"), QUICK)
    assert found.exit_code == report.UNCHECKED and "no server answers" in found.stopped


def test_a_server_that_dies_is_noticed_and_what_was_compared_is_kept(server):
    """This test ends the server, so it must stay the last test."""

    class Killer(Watcher):
        def measuring(self, axis, left):
            if axis.name == "position and order" and axis.pairs == 2:
                os.killpg(server[2], signal.SIGKILL)

    found = verify(RunningServer(server[0]), QUICK, watcher=Killer())
    assert (
        found.exit_code == report.UNCHECKED
        and not found.complete
        and "keeps all comparisons" in " ".join(found.verdict)
    )
    assert "is the server still running" in found.stopped or "no server answers" in found.stopped
    assert found.axes[0].state == report.PASSED and found.compared > 0
