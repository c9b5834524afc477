"""Measures the invariance of armed engines of several GPUs of one host: tensor, pipeline and data parallelism.

    PYTHONPATH=. python3 benchmarks/hopper/parallel.py [LABEL ...] [--results FOLDER] [--models FOLDER]

Without labels, every case below is measured, one after the other. Shapes are real, with few layers and seeded random
weights, which every engine loads from one file. "tensor parallel size" compares 2 ranks with 1, with
BI_PATCH_TP_INVARIANT=8. Engines of data parallelism get twelve prompts together and then one by one, and are compared
with one plain engine. The rows join one result file of the day. Exit code 1: a position differs, or an axis has no
result.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import bi_patch_entry

EQUAL = {"BI_PATCH_TP_INVARIANT": "8"}
FEW = ("batch size", "position and order", "mixed lengths", "prefix cache", "chunk budget", "decode = prefill")
SIZES = ("tensor parallel size", "batch size", "chunk budget", "decode = prefill")
MEMORY = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2 << 30}
SIZES_OF_GRAPHS = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]}}
LAYERS = {"Qwen3-8B": 4, "Qwen3-30B-A3B": 2, "DeepSeek-V2-Lite": 2}
TOKENS = 10


class Case(NamedTuple):
    """model: a name of LAYERS. axes: of verify, empty for those of level quick. engine: arguments of vllm.LLM."""

    model: str
    engine: dict[str, object]
    axes: tuple[str, ...] = ()
    eager: bool = True
    environ: dict[str, str] = {}


TWO = {"tensor_parallel_size": 2}
SHARED = TWO | {"enable_expert_parallel": True}
BOTH = (*FEW, "eager and compiled")
NCCL = TWO | {"disable_custom_all_reduce": True}
CASES = {
    "Qwen3-8B, 4 layers, TP 2 compiled": Case("Qwen3-8B", TWO, eager=False),
    "Qwen3-8B, 4 layers, TP 2": Case("Qwen3-8B", TWO),
    "Qwen3-8B, 4 layers, TP 2 without peer memory": Case("Qwen3-8B", NCCL, FEW),
    "Qwen3-8B, 4 layers, TP 2 without peer memory, compiled": Case("Qwen3-8B", NCCL, FEW, eager=False),
    "Qwen3-8B, 4 layers, TP 1 and 2 equal": Case("Qwen3-8B", TWO, SIZES, environ=EQUAL),
    "Qwen3-8B, 4 layers, TP 1 and 2 equal, compiled": Case("Qwen3-8B", TWO, SIZES, eager=False, environ=EQUAL),
    "Qwen3-8B, 4 layers, TP 1 in 8 parts": Case("Qwen3-8B", {}, FEW, environ=EQUAL),
    "Qwen3-30B-A3B, 2 layers, TP 2": Case("Qwen3-30B-A3B", TWO, FEW),
    "Qwen3-30B-A3B, 2 layers, TP 2 compiled": Case("Qwen3-30B-A3B", TWO, BOTH, eager=False),
    "Qwen3-30B-A3B, 2 layers, experts over 2 ranks": Case("Qwen3-30B-A3B", SHARED, FEW),
    "Qwen3-30B-A3B, 2 layers, experts over 2 ranks, compiled": Case("Qwen3-30B-A3B", SHARED, FEW, eager=False),
    "DeepSeek-V2-Lite, 2 layers, TP 2 compiled": Case("DeepSeek-V2-Lite", TWO, FEW, eager=False),
    "DeepSeek-V2-Lite, 2 layers, TP 2": Case("DeepSeek-V2-Lite", TWO, FEW),
    "Qwen3-8B, 4 layers, PP 2": Case("Qwen3-8B", {"pipeline_parallel_size": 2}, FEW),
    "Qwen3-8B, 4 layers, PP 2 compiled": Case("Qwen3-8B", {"pipeline_parallel_size": 2}, FEW, eager=False),
    "Qwen3-8B, 4 layers, DP 2": Case("Qwen3-8B", {"data_parallel_size": 2}),
    "Qwen3-8B, 4 layers, DP 2 compiled": Case("Qwen3-8B", {"data_parallel_size": 2}, eager=False),
}


def folder(model: str, root: Path, layers: int = 0) -> Path:
    """The folder of a model with weights; it is made once. layers: by default those of LAYERS."""
    from bi_patch.tools.models import shapes
    from bi_patch.tools.verify import checkpoint

    layers = layers or LAYERS[model]
    name = f"{model}, {layers} layers"
    made = root / f"{shapes.short(name)}-weights"
    if not (made / "done").exists():
        shape = shapes.SHAPES[model] | {"num_hidden_layers": layers}
        checkpoint.write(shapes.save(name, shape, root), 7, made)
        (made / "done").touch()
    return made


def verified(label: str, case: Case, model: Path) -> tuple[list, object, list[str]]:
    """The rows of verify's axes, its report, and what the report lacks."""
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.verify import levels, local
    from bi_patch.tools.verify import measure as verify

    class Teller(verify.Watcher):
        def settled(self, axis, left):
            if axis.compared or axis.reason:
                said = f"{axis.differing} of {axis.compared} differ {axis.state} {axis.reason}"
                print(f"{label}: {axis.name}: {said}", flush=True)

    level = replace(levels.LEVELS["quick"], seconds=None, cpu_seconds=None)
    system = local.local(
        str(model),
        level,
        dtype="bfloat16",
        eager=case.eager,
        engine_args=MEMORY | SIZES_OF_GRAPHS | case.engine,
        environ=dict(os.environ) | case.environ,
    )
    report = verify.verify(system, level, only=case.axes, watcher=Teller())
    return invariance.rows(label, report), report, invariance.unmeasured(report)


def prompts() -> list[list[int]]:
    """Prompts of 5 to 470 tokens, and three with a shared prefix of 300 tokens. Token ids are below 2,000."""
    made = random.Random(5)

    def tokens(count):
        return [made.randrange(2000) for _ in range(count)]

    shared = tokens(300)
    return [tokens(n) for n in (5, 17, 33, 64, 129, 220, 300, 411, 470)] + [shared + tokens(n) for n in (3, 40, 77)]


async def answers(options: dict) -> dict:
    """The answers of one engine, together and one by one: a list of [token, logprobs as hexadecimal floats]."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

    async def one(i, prompt, name):
        params = SamplingParams(
            temperature=0.8 * (i % 2), seed=i, max_tokens=TOKENS, logprobs=5, ignore_eos=True, detokenize=False
        )
        async for output in engine.generate({"prompt_token_ids": prompt}, params, f"{name} {i}"):
            last = output.outputs[0]
        exact = [sorted((token, held.logprob.hex()) for token, held in at.items()) for at in last.logprobs]
        return list(zip(last.token_ids, exact))

    asked = list(enumerate(prompts()))
    together = await asyncio.gather(*(one(i, prompt, "together") for i, prompt in asked))
    alone = [await one(i, prompt, "alone") for i, prompt in asked]
    engine.shutdown()
    return {"together": together, "alone": alone}


def independent(label: str, case: Case, model: Path, scratch: Path) -> list:
    """The rows of an engine of several data-parallel ranks against a plain engine, one by one."""
    from bi_patch.tools import evidence

    given = MEMORY | SIZES_OF_GRAPHS | {"model": str(model), "dtype": "bfloat16", "max_model_len": 1024, "seed": 0}
    given |= {
        "max_num_batched_tokens": 512,
        "max_num_seqs": 32,
        "enforce_eager": case.eager,
        "skip_tokenizer_init": True,
    }
    files = [scratch / f"{os.getpid()}-{name}.json" for name in ("plain", "several")]
    running = [
        subprocess.Popen([sys.executable, __file__, "--engine", json.dumps(options), str(file)])
        for options, file in zip((given, given | case.engine), files)
    ]
    if any([process.wait() for process in running]):
        raise RuntimeError(f"{label}: an engine failed")
    plain, several = (json.loads(file.read_text()) for file in files)
    rows = []
    for axis, got in (("batch size", several["together"]), ("one by one", several["alone"])):
        pairs = [p for one, other in zip(plain["alone"], got, strict=True) for p in zip(one, other, strict=True)]
        rows.append(evidence.InvarianceRow(label, axis, len(pairs), sum(a != b for a, b in pairs)))
        print(f"{label}: {axis}: {rows[-1].differing} of {rows[-1].compared} differ", flush=True)
    return rows


def measure(label: str, results: Path, root: Path) -> bool:
    """Measure one case and write its rows. Returns whether every axis has a result and no position differs."""
    from bi_patch.tools import evidence

    class Ranks(evidence.Invariance, kw_only=True):
        variant = property(lambda self: "ranks")

    case, holes = CASES[label], []
    model = folder(case.model, root)
    if "data_parallel_size" in case.engine:
        rows = independent(label, case, model, root)
        import torch
        import vllm

        here = SimpleNamespace(
            device=torch.cuda.get_device_name(),
            vllm=vllm.__version__,
            torch=str(torch.__version__),
            threads=torch.get_num_threads(),
        )
    else:
        rows, here, holes = verified(label, case, model)
    print(f"{label}: {'; '.join(holes) or 'complete'}", flush=True)
    if not rows:
        return False
    found = evidence.new(Ranks, here)
    found.rows, found.command = rows, "benchmarks/hopper/parallel.py"  # the cases share a file
    found.note = ". ".join(f"{label}: {hole.rstrip('.')}" for hole in holes)
    evidence.write(found, results)
    return not holes and not evidence.total_differing(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", nargs="*", default=list(CASES))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--models", type=Path, default=Path("/tmp/models"))
    parser.add_argument("--prepare", action="store_true", help="only write the models of the cases")
    parser.add_argument("--engine", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        import bi_patch

        bi_patch.arm()
        options, file = args.engine
        Path(file).write_text(json.dumps(asyncio.run(answers(json.loads(options)))))
        return
    bi_patch_entry.without_arming()
    good = True
    for label in args.labels:
        start = time.perf_counter()
        if args.prepare:
            folder(CASES[label].model, args.models)
        else:
            good &= measure(label, args.results, args.models)
        print(f"{label}: {time.perf_counter() - start:.0f} s", flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
