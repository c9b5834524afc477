"""Measures armed engines of other forms on CPU against a plain one: several ranks, text-only and constant rotations.

    PYTHONPATH=. python3 -P benchmarks/cpu/engines.py [--only ranks|replicas|text] [--case TEXT] [--results FOLDER]

Each engine gets nine prompts together and then one by one, greedy and seeded; an engine of data-parallel ranks then
gets them one by one on each rank. Every answer is compared, bit by bit, with the answers that the plain engine of the
same model gives one by one. The plain engine of tensor-parallel ranks has as many of them. Exit code 1: positions
differ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import bi_patch_entry

TOKENS = 10
ALONE = "one by one"
PLAIN = {
    "dtype": "bfloat16",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 32,
    "seed": 0,
}
COMPILED = {"enforce_eager": False}
TEXT = {"language_model_only": True}
CUT, STAGED, WHOLE = ({f"{kind}_parallel_size": 2} for kind in ("tensor", "pipeline", "data"))
# Two threads, because one hides variance.
ENVIRON = {
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
THREADS = {"replicas": "1"}  # two cores have four ranks
EQUAL = {"BI_PATCH_TP_INVARIANT": "8"}


class Case(NamedTuple):
    """plain: options of the plain engine. other: options of the engine to compare, None for the plain engine's own.
    environ: of both."""

    label: str
    model: str
    plain: dict[str, object]
    other: dict[str, object] | None
    environ: dict[str, str] = {}


# By the file of the results.
CASES = {
    "ranks": (
        Case("tiny-qwen3 bf16 DP 2", "qwen3", {}, {"data_parallel_size": 2}),
        Case("tiny-qwen3 bf16 PP 2 compiled", "qwen3", {}, {"pipeline_parallel_size": 2} | COMPILED),
    ),
    "replicas": (
        Case("tiny-qwen3 bf16 DP 4", "qwen3", {}, {"data_parallel_size": 4}),
        Case("tiny-qwen3 bf16 DP 4 compiled", "qwen3", {}, {"data_parallel_size": 4} | COMPILED),
        *(
            Case(f"tiny-{name} bf16 TP 2 DP 2{' compiled' * bool(mode)}", name, CUT, CUT | WHOLE | mode)
            for name in ("qwen3", "qwen3-int8", "qwen3-w4a16", "qwen2-awq", "llama-gptq")
            for mode in ({}, COMPILED)
        ),
        Case("tiny-qwen3 bf16 TP 2 DP 2, equal for every size", "qwen3", {}, CUT | WHOLE, EQUAL),
        Case("tiny-qwen3 bf16 TP 2 PP 2, equal for every size", "qwen3", {}, CUT | STAGED, EQUAL),
        *(
            Case(f"tiny-qwen3 bf16 {name} 2{' compiled' * bool(mode)}", "qwen3", plain, plain | STAGED | more | mode)
            for name, plain, more in (("PP", {}, {}), ("TP 2 PP", CUT, {}), ("PP 2 DP", {}, WHOLE))
            for mode in ({}, COMPILED)
        ),
    ),
    "text": (
        Case("tiny-idefics3 bf16, language model only", "idefics3", TEXT, None),
        Case("tiny-idefics3 bf16, language model only, compiled", "idefics3", TEXT, TEXT | COMPILED),
        Case("tiny-hunyuan bf16", "hunyuan", {}, None),
        Case("tiny-hunyuan bf16 compiled", "hunyuan", {}, COMPILED),
    ),
}


def prompts() -> list[list[int]]:
    """Prompts of 5 to 470 tokens, and three with a shared prefix of 300 tokens. Token ids are below 2000."""
    made = random.Random(5)

    def tokens(count):
        return [made.randrange(2000) for _ in range(count)]

    shared = tokens(300)
    return [tokens(n) for n in (5, 17, 33, 129, 300, 470)] + [shared + tokens(n) for n in (3, 40, 77)]


async def answers(options: dict) -> dict[str, list]:
    """The answers of one engine to each prompt, by how it was asked: together, one by one, and of data-parallel ranks
    one by one on each rank. An answer is a list of [token, logprobs as hexadecimal floats]."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**(PLAIN | options)))

    async def one(i, prompt, name, **where):
        params = SamplingParams(
            temperature=0.8 * (i % 2), seed=i, max_tokens=TOKENS, logprobs=5, ignore_eos=True, detokenize=False
        )
        async for output in engine.generate({"prompt_token_ids": prompt}, params, f"{name} {i}", **where):
            last = output.outputs[0]
        exact = [sorted((token, held.logprob.hex()) for token, held in at.items()) for at in last.logprobs]
        return list(zip(last.token_ids, exact))

    asked = list(enumerate(prompts()))
    found = {"batch size": await asyncio.gather(*(one(i, prompt, "together") for i, prompt in asked))}
    found[ALONE] = [await one(i, prompt, "alone") for i, prompt in asked]
    if (ranks := options.get("data_parallel_size", 1)) > 1:
        found["data-parallel rank"] = [
            await one(i, prompt, f"rank {rank}", data_parallel_rank=rank)
            for rank in range(ranks)
            for i, prompt in asked
        ]
    engine.shutdown()
    return found


def start(options: dict, environ: dict[str, str]) -> dict[str, list]:
    """Start an armed engine in a child process, whose environment has `environ`, too, and return its answers."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        # -P: beside this file lies a requests.py, which is not the library that vLLM imports
        command = [sys.executable, "-P", __file__, "--engine", json.dumps(options), file.name]
        subprocess.run(command, check=True, env=os.environ | ENVIRON | environ)
        return json.loads(Path(file.name).read_text())


def differing(wanted: list, got: list) -> tuple[int, int]:
    """Positions compared, and how many differ."""
    pairs = [pair for one, other in zip(wanted, got, strict=True) for pair in zip(one, other, strict=True)]
    return len(pairs), sum(a != b for a, b in pairs)


def make(name: str, root: Path) -> str:
    """The folder of a model with random weights."""
    import torch
    import transformers

    from bi_patch import settings
    from bi_patch.tools.models import recipes

    base = recipes.path(recipes.QWEN3, cache=settings.read().cache)
    if f"tiny-{name}" in recipes.NAMES:
        return str(recipes.path(f"tiny-{name}", cache=settings.read().cache))
    torch.manual_seed(0)
    shape = dict(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=2048,
        max_position_embeddings=2048,
    )
    if name == "idefics3":
        sight = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
        config = transformers.Idefics3Config(
            text_config=transformers.LlamaConfig(**shape), vision_config=sight | {"image_size": 28, "patch_size": 14}
        )
        model = transformers.Idefics3ForConditionalGeneration(config)
    else:
        rotation = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0}
        config = transformers.HunYuanDenseV1Config(**shape, rope_parameters=rotation)
        config.use_qk_norm = True
        model = transformers.HunYuanDenseV1ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.05)
    folder = root / name
    model.to(torch.bfloat16).save_pretrained(folder)
    for file in base.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def _kind(name: str):
    """evidence.Invariance for a file with `name` in its name."""
    from bi_patch.tools import evidence

    class Found(evidence.Invariance, kw_only=True):
        variant = property(lambda self: name)

    return Found


def measure(parts: list[str], results: Path, text: str = "") -> int:
    """Measure the cases of these parts whose labels contain a text, write a result file for each part, and return how
    many positions differ."""
    import torch
    import vllm

    from bi_patch.tools import evidence
    from bi_patch.tools.verify.engine import cpu_name

    total = 0
    with tempfile.TemporaryDirectory() as root:
        cases = {part: [case for case in CASES[part] if text in case.label] for part in parts}
        folders = {name: make(name, Path(root)) for name in {case.model for held in cases.values() for case in held}}
        for variant in parts:
            rows, plain, threads = [], {}, THREADS.get(variant, ENVIRON["OMP_NUM_THREADS"])
            for case in cases[variant]:
                given, environ = {"model": folders[case.model]}, case.environ | {"OMP_NUM_THREADS": threads}
                kind = (case.model, *case.plain, *case.environ)
                if kind not in plain:
                    plain[kind] = start(given | case.plain, environ)
                got, wanted = plain[kind], plain[kind][ALONE]
                if case.other is not None:
                    got = start(given | case.other, environ)
                for axis, answered in got.items():
                    if answered is wanted:
                        continue
                    compared, differ = differing(wanted * (len(answered) // len(wanted)), answered)
                    print(f"{case.label}: {axis}: {differ} of {compared} differ", flush=True)
                    rows.append(evidence.InvarianceRow(case.label, axis, compared, differ))
                    total += differ
            here = SimpleNamespace(
                device=f"{cpu_name()} ({os.cpu_count()} cores)",
                vllm=vllm.__version__,
                torch=str(torch.__version__),
                threads=int(threads),
            )
            found = evidence.new(_kind(variant), here)
            found.rows = rows
            found.command = f"python3 benchmarks/cpu/engines.py --only {variant}"  # calls with --case share a file
            evidence.write(found, results)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(CASES))
    parser.add_argument("--case", default="", help="only cases whose label contains this text")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--engine", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        import bi_patch

        bi_patch.arm()
        options, file = args.engine
        Path(file).write_text(json.dumps(asyncio.run(answers(json.loads(options)))))
        return
    bi_patch_entry.without_arming()
    sys.exit(1 if measure([args.only] if args.only else list(CASES), args.results, args.case) else 0)


if __name__ == "__main__":
    main()
