"""Engines of data-parallel ranks, for parallel.py: their answers to fixed prompts, and which of them differ.

Ranks of a model without experts are independent engines, so their answers are compared with those of a plain engine.
Ranks of a model with experts share each step, and the sums of experts over ranks round as no plain engine's do. So each
prompt is asked alone of the first rank, while the others run empty steps; then alone of every other rank; all at once
of the first rank; and in several copies of all ranks at once, in random order, while steps have other lengths on each
rank.

    PYTHONPATH=. python3 benchmarks/hopper/data_ranks.py OPTIONS OUT.json [--stock] [--faults]

writes the answers of one engine. OPTIONS: arguments of vLLM's engine as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

TOKENS = 10
COPIES = 4
ALONE, TOGETHER, FAULT = "alone", "together", "fault: "


def prompts() -> list[list[int]]:
    """Prompts of 5 to 470 tokens, and three with a shared prefix of 300 tokens. Token ids are below 2,000."""
    made = random.Random(5)

    def tokens(count):
        return [made.randrange(2000) for _ in range(count)]

    shared = tokens(300)
    return [tokens(n) for n in (5, 17, 33, 64, 129, 220, 300, 411, 470)] + [shared + tokens(n) for n in (3, 40, 77)]


async def answers(options: dict, faults: Sequence[str] = ()) -> dict[str, list]:
    """The answers of one engine to each prompt, by how it was asked: a list of [token, logprobs as hexadecimal floats].

    ALONE: one by one, of an engine with experts of its first rank; TOGETHER: all at once. An engine with experts has
    more, see the module's docstring. faults: names of bi_patch.tools.faults.ranks. Each is planted in every rank of an
    engine with experts in eager mode; then the first rank is asked alone, and all ranks at once.
    """
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    if faults:
        from bi_patch.tools.faults import ranks as planted
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
    ranks = options.get("data_parallel_size", 1) if engine.model_config.is_moe else 1

    async def one(i, prompt, name, rank=0, delay=0.0):
        await asyncio.sleep(delay)
        params = SamplingParams(
            temperature=0.8 * (i % 2), seed=i, max_tokens=TOKENS, logprobs=5, ignore_eos=True, detokenize=False
        )
        where = {"data_parallel_rank": rank} if ranks > 1 else {}
        async for output in engine.generate({"prompt_token_ids": prompt}, params, f"{name} {i}", **where):
            last = output.outputs[0]
        exact = [sorted((token, held.logprob.hex()) for token, held in at.items()) for at in last.logprobs]
        return list(zip(last.token_ids, exact))

    asked = list(enumerate(prompts()))

    async def alone(rank, kind=""):
        return [await one(i, prompt, f"{kind}{ALONE} {rank}", rank) for i, prompt in asked]

    found = {TOGETHER: await asyncio.gather(*(one(i, prompt, TOGETHER) for i, prompt in asked)), ALONE: await alone(0)}

    async def busy(kind):
        """All ranks at once. The cache is emptied, so that they compute prompts again, beside other steps."""
        await engine.reset_prefix_cache()
        made = random.Random(9)
        places = [(copy, i, made.randrange(ranks)) for copy in range(COPIES) for i, _ in asked]
        held = [one(i, asked[i][1], f"{kind} {copy}", rank, made.random() * 0.5) for copy, i, rank in places]
        done = await asyncio.gather(*held)
        return {f"{kind} {copy}": done[len(asked) * copy : len(asked) * (copy + 1)] for copy in range(COPIES)}

    if ranks > 1:
        found |= await busy("busy")
    for name in (*faults, "") if faults else ():
        await engine.reset_prefix_cache()
        await engine.collective_rpc(functools.partial(planted.put, name=name))
        found |= {f"{FAULT}{name} {ALONE}": await alone(0, f"{FAULT}{name} ")} | await busy(f"{FAULT}{name}")
    if ranks > 1:
        await engine.reset_prefix_cache()
    found |= {f"rank {rank}": await alone(rank) for rank in range(1, ranks)}
    engine.shutdown()
    return found


def engines(label: str, scratch: Path, *options: dict, flags: Sequence[str] = ()) -> list[dict[str, list]]:
    """The answers of engines that run side by side, one for each dictionary of arguments. flags: of this program."""
    files = [scratch / f"{os.getpid()}-{number}.json" for number in range(len(options))]
    running = [
        subprocess.Popen([sys.executable, __file__, json.dumps(given), str(file), *flags])
        for given, file in zip(options, files)
    ]
    if any([process.wait() for process in running]):
        raise RuntimeError(f"{label}: an engine failed")
    return [json.loads(file.read_text()) for file in files]


_AXES = {
    TOGETHER: "batch size",
    ALONE: "one by one",
    "busy": "load of all ranks",
    "rank": "data-parallel rank",
}


def differing(want: list, found: dict[str, list], *left_out: str) -> Iterator[tuple[str, int, int]]:
    """For each axis: its name, and how many positions were compared and differ. want: the answers to compare with."""
    for kind, axis in _AXES.items():
        got = [held for name, held in found.items() if name.partition(" ")[0] == kind and name not in left_out]
        if got:
            yield axis, *_counted(want, got)


def caught(found: dict[str, list]) -> Iterator[tuple[str, int, int]]:
    """For each planted fault, and for none (""): its name, and how many positions were compared and differ."""
    names = {name.removeprefix(FAULT).rpartition(" ")[0]: None for name in found if name.startswith(FAULT)}
    for fault in names:
        yield (
            fault,
            *_counted(found[f"{FAULT}{fault} {ALONE}"], [found[f"{FAULT}{fault} {copy}"] for copy in range(COPIES)]),
        )


def _counted(want: list, got: Sequence[list]) -> tuple[int, int]:
    both = [held for other in got for held in zip(want, other, strict=True)]
    pairs = [pair for one, other in both for pair in zip(one, other, strict=True)]
    return len(pairs), sum(a != b for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("options")
    parser.add_argument("out", type=Path)
    parser.add_argument("--stock", action="store_true", help="without bi_patch, as a control")
    parser.add_argument("--faults", action="store_true", help="plant other sums over ranks as well")
    args = parser.parse_args()
    options = json.loads(args.options)
    faults: tuple[str, ...] = ()
    if args.faults:
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # a function is sent to every rank
    if not args.stock:
        import bi_patch

        bi_patch.arm()
    if args.faults:
        from bi_patch.tools.faults import ranks

        faults = ranks.shown_by(options.get("data_parallel_size", 1))
    args.out.write_text(json.dumps(asyncio.run(answers(options, faults))))


if __name__ == "__main__":
    main()
