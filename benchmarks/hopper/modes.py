"""Compares a compiled engine with an eager engine, which start side by side: few layers of quantized models.

    PYTHONPATH=. python3 benchmarks/hopper/modes.py SCHEME ... [--layers 2] [--limit 140] [--results FOLDER]

SCHEME is a name of schemes.py. Each engine answers the same prompts alone, then at once, and writes logprobs. The rows
have verify's axes: "batch size" within the compiled engine, "eager and compiled" between the two. Exit code 1: a
position differs, or an engine gave no answers within --limit seconds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bi_patch_entry

bi_patch_entry.without_arming()

import run  # noqa: E402
import schemes  # noqa: E402

LENGTHS, TOKENS = (3, 12, 40, 130, 300, 600), 24
MODES = ("compiled", "eager")


def answer(scheme: str, mode: str, out: Path, layers: int) -> None:
    """Run one engine: every prompt alone, then all at once. Writes the tokens and logprobs of prompts and answers."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_BATCH_INVARIANT": "1", "BI_PATCH": "1"}
    from bi_patch import arm

    arm()  # before vllm loads
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    from bi_patch.tools.models import shapes
    from bi_patch.tools.verify import weights

    weights.make_random(7)
    with tempfile.TemporaryDirectory() as root:
        llm = LLM(
            model=shapes.save("model", schemes.config(scheme, layers), root),
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            max_model_len=1024,
            max_num_batched_tokens=2048,
            enforce_eager=mode == "eager",
            enable_prefix_caching=False,
            gpu_memory_utilization=0.1,
            kv_cache_memory_bytes=1 << 30,
            compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8]},
            **schemes.arguments(scheme),
        )
    prompts = [TokensPrompt(prompt_token_ids=[(i * 7919 + n * 31) % 20000 + 100 for i in range(n)]) for n in LENGTHS]
    given = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    alone = [llm.generate([prompt], given, use_tqdm=False)[0] for prompt in prompts]
    together = llm.generate(prompts, given, use_tqdm=False)
    out.write_text(json.dumps({"alone": list(map(read, alone)), "together": list(map(read, together))}))
    os._exit(0)


def read(output) -> list[str]:
    """Token and logprob of each position of one request."""
    held = [*(output.prompt_logprobs or [])[1:], *output.outputs[0].logprobs]
    ids = [*output.prompt_token_ids[1:], *output.outputs[0].token_ids]
    return [f"{token} {at[token].logprob.hex()}" for token, at in zip(ids, held, strict=True)]


def differing(a: list[list[str]], b: list[list[str]]) -> tuple[int, int]:
    """The positions that were compared, and those that differ."""
    pairs = [pair for x, y in zip(a, b, strict=True) for pair in zip(x, y, strict=True)]
    return len(pairs), sum(x != y for x, y in pairs)


def main() -> None:
    parser = run.options(__doc__)
    parser.add_argument("schemes", nargs="+")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--limit", type=int, default=140)
    parser.add_argument("--one", nargs=2, metavar=("MODE", "FILE"), help="run one engine in this process")
    a = parser.parse_args()
    if a.one:
        answer(a.schemes[0], a.one[0], Path(a.one[1]), a.layers)
    a.results.mkdir(parents=True, exist_ok=True)
    sys.exit(compare(a))


def compare(a: argparse.Namespace) -> int:
    from bi_patch.tools import evidence
    from bi_patch.tools.models import shapes

    end = time.monotonic() + a.limit
    files, started = {}, {}
    for key in [(scheme, mode) for scheme in a.schemes for mode in MODES]:
        files[key] = a.results / f"{shapes.short(' '.join(key))}.json"
        command = [sys.executable, __file__, key[0], "--layers", str(a.layers), "--one", key[1], str(files[key])]
        with open(files[key].with_suffix(".log"), "w") as log:
            started[key] = subprocess.Popen(command, stdout=log, stderr=log)
    for process in started.values():
        try:
            process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    rows, failed = [], False
    for scheme in a.schemes:
        held = [json.loads(files[scheme, mode].read_text()) if files[scheme, mode].exists() else None for mode in MODES]
        label = schemes.label(scheme, a.layers)
        pairs = {} if held[0] is None else {"batch size": (held[0]["alone"], held[0]["together"])}
        if None not in held:
            pairs["eager and compiled"] = (held[0]["alone"], held[1]["alone"])
        for axis, (x, y) in pairs.items():
            compared, count = differing(x, y)
            print(f"{label}: {axis}: {count} of {compared} differ", flush=True)
            rows.append(evidence.InvarianceRow(label, axis, compared, count, ""))
            failed |= bool(count)
        failed |= None in held
    if rows:
        found = evidence.new(evidence.Invariance, about())
        found.rows, found.command = rows, "python3 benchmarks/hopper/modes.py"
        print(evidence.write(found, a.results))
    return int(failed)


def about():
    """The device and the libraries, as evidence.new reads them."""
    import importlib.metadata
    from types import SimpleNamespace

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    vllm = importlib.metadata.version("vllm")
    return SimpleNamespace(device=device, vllm=vllm, torch=str(torch.__version__), threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
