"""Runs in an armed child process: what single requests may turn on, each alone and in company, on one real engine.

python request_kinds.py MODEL [DTYPE [ARGUMENTS]]. ARGUMENTS: further arguments of vllm.LLM as JSON. Prints `ok NAME` or
`FAIL NAME: reason` for each comparison, and behind a tab how many generated tokens were compared, with all their
logprobs, and how many differ. `requests.py` starts it, and benchmarks/hopper/features.py on a GPU.
"""

import copy
import itertools
import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import bi_patch  # noqa: E402  arms before vllm loads

assert bi_patch.__file__

import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.sampling_params import BeamSearchParams, RequestOutputKind  # noqa: E402

from bi_patch.tools.verify import streams  # noqa: E402
from bi_patch.tools.verify.answers import Request  # noqa: E402

MODEL, DTYPE = sys.argv[1], (*sys.argv[2:], "float32")[0]
ARGUMENTS: dict[str, object] = json.loads((*sys.argv[3:], "{}")[0])


def prompt(length: int, seed: int) -> list[int]:
    return [(seed * 31 + 7 * i * i + i) % 1900 for i in range(length)]


OTHERS = [
    ({"prompt_token_ids": prompt(n, n)}, SamplingParams(max_tokens=3 + n % 5, temperature=t, seed=n, logprobs=1))
    for n, t in ((2, 0.0), (17, 0.9), (64, 0.0), (130, 1.2), (9, 0.5))
]


def start() -> LLM:
    given: dict[str, object] = {
        "dtype": DTYPE,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "enforce_eager": True,
        "enable_prompt_embeds": True,
        "scheduling_policy": "priority",
    }
    return LLM(MODEL, **(given | ARGUMENTS))


def said(output) -> list:
    """Tokens and the bits of all logprobs of each answer of a request."""
    return [
        [list(c.token_ids), [[(t, p.logprob.hex()) for t, p in step.items()] for step in c.logprobs or ()]]
        for c in output.outputs
    ]


def run(llm: LLM, asked: list, priorities: list[int] | None = None, call=None, at: int = 0, warm=False) -> list:
    """The answers to all requests together. call: runs before engine step `at`. warm: the prefix cache is kept."""
    if not warm:
        llm.reset_prefix_cache()
    engine = llm.llm_engine
    run.serial = getattr(run, "serial", 0) + 1
    names = [f"{run.serial}-{i}" for i in range(len(asked))]
    for name, (given, params), priority in zip(names, asked, priorities or [0] * len(asked), strict=True):
        engine.add_request(name, given, params.clone(), priority=priority)
    done, step = {}, 0
    while engine.has_unfinished_requests():
        if call is not None and step == at:
            call()
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        step += 1
    return [said(done[name]) for name in names]


def report(name: str, wrong: str, compared: int = 0, differing: int = 0) -> None:
    print(f"FAIL {name}: {wrong}" if wrong else f"ok {name}", f"{compared} {differing}", sep="\t", flush=True)


def compare(name: str, pairs: list[tuple[list, list]]) -> None:
    """Report pairs of what `said` gives, token by token with its logprobs."""
    compared = differing = 0
    first = ""
    for wanted, got in pairs:
        for one, other in itertools.zip_longest(wanted, got, fillvalue=[[], []]):
            tokens = _positions(one, other)
            compared += len(tokens)
            differing += sum(a != b for a, b in tokens)
        if wanted != got and not first:
            first = f"{json.dumps(wanted)[:300]} != {json.dumps(got)[:300]}"
    report(name, first, compared, differing)


def _positions(one: list, other: list) -> list:
    """Pairs of (token, its logprobs) of two answers."""
    sides = [list(itertools.zip_longest(tokens, scores)) for tokens, scores in (one, other)]
    return list(itertools.zip_longest(*sides))


def alone_and_among(llm: LLM, name: str, asked: tuple) -> list:
    (alone,) = run(llm, [asked])
    together = run(llm, [*OTHERS[:3], asked, *OTHERS[3:]])[3]
    again = run(llm, [asked, asked, *OTHERS])[1]
    compare(name, [(alone, together), (alone, again)])
    return alone


def seeded(**more) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 8, "temperature": 0.8, "seed": 11, "logprobs": 2, **more})


def several(llm: LLM) -> None:
    """A request for several answers, which vLLM's engine returns together at the end."""
    asked = seeded(n=3, output_kind=RequestOutputKind.FINAL_ONLY)
    answers = alone_and_among(llm, "n", ({"prompt_token_ids": prompt(40, 3)}, asked))
    report("n answers came", "" if len(answers) == 3 else f"{len(answers)}")


def beams(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=6)
    texts = [{"prompt_token_ids": prompt(n, n)} for n in (5, 40, 130)]

    def ask(prompts) -> list:
        llm.reset_prefix_cache()
        found = llm.beam_search(prompts, params)
        return [[generated(beam) for beam in out.sequences] for out in found]

    def generated(beam) -> list:
        """The beam's tokens behind its prompt, each with its logprobs, and with the beam's sum so far at the last."""
        scores = [[(t, p.logprob.hex()) for t, p in step.items()] for step in beam.logprobs]
        scores[-1].append(float(beam.cum_logprob).hex())
        return [list(beam.tokens[-len(scores) :]), scores]

    alone = [ask([text])[0] for text in texts]
    compare("beam search", list(zip(alone, ask(texts), strict=True)))


def embeddings(llm: LLM) -> None:
    """A prompt's embeddings: in company, and against the prompt's tokens."""
    file = next(Path(MODEL).glob("*.safetensors"))
    with safe_open(file, "pt") as held:
        table = held.get_tensor("model.embed_tokens.weight").float()
    tokens = prompt(70, 5)
    given = {"prompt_embeds": table[torch.tensor(tokens)]}
    answers = alone_and_among(llm, "prompt_embeds", (given, seeded(temperature=0.0)))
    (plain,) = run(llm, [({"prompt_token_ids": tokens}, seeded(temperature=0.0))])
    compare("prompt_embeds against tokens", [(plain, answers)])
    warm = run(llm, [(given, seeded(temperature=0.0))] * 2, warm=True)
    compare("prompt_embeds on a warm cache", [(answers, one) for one in warm])
    penalized = (given, seeded(repetition_penalty=1.9, presence_penalty=0.3))
    alone = alone_and_among(llm, "prompt_embeds with penalties", penalized)
    for other in range(3):  # a prompt of the answer's tokens had the same place in the batch
        run(llm, [({"prompt_token_ids": (alone[0][0] * 20)[other:]}, seeded(repetition_penalty=1.5))])
        compare("prompt_embeds with penalties after other prompts", [(alone, run(llm, [penalized])[0])])
    mistaken(llm, table[torch.tensor(tokens)], tokens)


def mistaken(llm: LLM, held: torch.Tensor, tokens: list[int]) -> None:
    """Embeddings whose bytes others have in the cache, as another type or as tokens, and those that are refused."""
    long, held = [0, *tokens * 4], torch.cat([torch.zeros(1, held.shape[1]), *[held] * 4]).bfloat16()
    every = {"prompt_embeds": held, "prompt_token_ids": long}
    asked = [
        {"prompt_embeds": held},
        {"prompt_embeds": held.view(torch.float16)},
        {**every, "prompt_is_token_ids": [True] * len(long)},
        {**every, "prompt_is_token_ids": [False] + [True] * (len(long) - 1)},
    ]
    alone = [run(llm, [(given, seeded())])[0] for given in asked]
    llm.reset_prefix_cache()
    for order in (range(4), range(3, -1, -1)):
        found = [run(llm, [(asked[i], seeded())], warm=True)[0] for i in order]
        compare(
            "prompt_embeds with the bytes of others", [(alone[i], one) for i, one in zip(order, found, strict=True)]
        )
    bad = held.clone()
    bad[9, 3] = float("inf")
    for name, wrong in (("an infinity", bad), ("another width", held[:, :-1])):
        try:
            run(llm, [({"prompt_embeds": wrong}, seeded())])
            report(f"prompt_embeds with {name} are refused", "an answer came")
        except ValueError as error:
            report(f"prompt_embeds with {name} are refused", "" if "embeds.check" in str(error) else str(error))


def limits(llm: LLM) -> None:
    given = {"prompt_token_ids": prompt(33, 9)}
    allowed = list(range(100, 160))
    both = seeded(allowed_token_ids=allowed, logit_bias={110: 4.0, 500: 50.0})
    (answer,) = alone_and_among(llm, "logit_bias with allowed_token_ids", (given, both))
    report("allowed_token_ids hold", "" if set(answer[0]) <= set(allowed) else f"{answer[0]}")
    (first,) = run(llm, [(given, seeded(max_tokens=1))])
    stop = first[0][0][0]
    ends = seeded(stop_token_ids=[stop], min_tokens=5)
    (answer,) = alone_and_among(llm, "min_tokens", (given, ends))
    report("min_tokens hold", "" if len(answer[0]) >= 5 else f"{answer[0]}")


def priorities(llm: LLM) -> None:
    asked = [({"prompt_token_ids": prompt(20 + 13 * i, i)}, seeded(seed=i)) for i in range(12)]
    alone = [run(llm, [one])[0] for one in asked]
    for order in ([0] * 12, list(range(12)), list(range(12))[::-1], [i * 5 % 12 for i in range(12)]):
        compare(f"priorities {order}", list(zip(alone, run(llm, asked, order), strict=True)))


def resets(llm: LLM) -> None:
    """A reset preempts all running requests; they go on as if nothing happened."""
    asked = [({"prompt_token_ids": prompt(5 + 40 * i, i)}, seeded(seed=i, max_tokens=12)) for i in range(5)]
    asked += [({"prompt_token_ids": prompt(90, 77)}, seeded(temperature=0.0, max_tokens=12))]
    plain = run(llm, asked)
    for at in (1, 3, 7, 10):
        found: list[bool] = []

        def reset(found=found) -> None:
            found.append(llm.reset_prefix_cache(reset_running_requests=True))

        got = run(llm, asked, None, reset, at)
        compare(f"a reset of running requests before step {at}", list(zip(plain, got, strict=True)))
        report(f"the reset before step {at} took place", "" if found == [True] else f"{found}")


def streamed(llm: LLM) -> None:
    """Each part of a streamed input, against a request whose prompt is all that came before; alone and in company."""
    sizes = [(1, seeded()), (40, seeded(temperature=0.0, repetition_penalty=1.3)), (33, seeded(seed=12, max_tokens=3))]
    parts = [(prompt(size, size), params) for size, params in sizes]
    alone = session(llm, parts, [])
    tokens, wanted = [], []
    for given, params in parts:
        tokens += given
        (answer,) = run(llm, [({"prompt_token_ids": tokens}, params)])
        wanted.append(answer[0])
        tokens = tokens + answer[0][0][:-1]  # vLLM drops the last token of a part
    compare("streamed inputs against whole prompts", [(wanted, alone)])
    for others in (OTHERS[:2], OTHERS, OTHERS[::-1]):
        compare("streamed inputs in company", [(alone, session(llm, parts, others))])
    try:
        session(llm, [parts[0], (prompt(9, 9), seeded(logprobs=1))], [])
        report("streamed inputs with other logprobs are refused", "an answer came")
    except ValueError as error:
        report("streamed inputs with other logprobs are refused", "" if "streamed.parts" in str(error) else str(error))


def paused(llm: LLM) -> None:
    """A streamed input whose next part comes after a pause that aborted the parts before. It is refused."""
    name, engine = "streamed inputs that a pause aborted are refused", llm.llm_engine
    whole = Request((*prompt(40, 40), *prompt(9, 9)), max_tokens=3, parts=((40, 1),))
    stream, sent = streams.Stream(engine, "aborted", whole, seeded()), False
    try:
        while not sent:
            for output in engine.step():
                if output.outputs[0].finish_reason:
                    llm.sleep(level=0, mode="abort")
                    llm.wake_up()
                    sent = True
                stream.take(output)  # sends the next part
        report(name, "a part without the parts before was taken")
    except ValueError as error:
        report(name, "" if "streamed.ended" in str(error) else str(error))
    finally:
        engine.abort_request(["aborted"])


def session(llm: LLM, parts: list, others: list) -> list:
    """The answers to the parts of one streamed input: tokens, and the bits of their logprobs."""
    llm.reset_prefix_cache()
    engine = llm.llm_engine
    session.serial = getattr(session, "serial", 0) + 1
    name = f"session-{session.serial}"
    for i, (given, params) in enumerate(others):
        engine.add_request(f"{name}-{i}", given, params.clone())
    for given, params in parts:
        params = params.clone()
        params.output_kind = RequestOutputKind.DELTA
        request = engine.input_processor.process_inputs(
            name,
            {"prompt_token_ids": list(given), "type": "token"},
            params,
            supported_tasks=engine.get_supported_tasks(),
            resumable=True,
        )
        request.external_req_id = name
        engine.output_processor.add_request(request, None, None, 0)
        sent = copy.copy(request)  # as through a socket: the front end extends its own list of tokens
        sent.prompt_token_ids = list(given)
        engine.engine_core.add_request(sent)
    found: list = [[[], []]]
    while len(found) <= len(parts) or engine.output_processor.request_states.keys() - {name}:
        for output in engine.step():
            if output.request_id != name:
                continue
            (tokens, scores), (more, bits) = found[-1], said(output)[0]
            tokens += more
            scores += bits
            if output.outputs[0].finish_reason:
                found.append([[], []])
    engine.abort_request([name])
    return found[: len(parts)]


def main() -> None:
    llm = start()
    for kind in (several, beams, embeddings, limits, priorities, resets, streamed, paused):
        try:
            kind(llm)
        except Exception as error:
            report(kind.__name__, f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
