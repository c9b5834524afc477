"""Compares engines with speculation with engines without, on a GPU: bits, and time on text that repeats itself.

    PYTHONPATH=. python3 benchmarks/hopper/speculation.py bits OUT.json [--layers N] [--drafts 1,4] [--eager]
        [--methods ngram,draft_model,eagle,eagle3] [--beside fp8,lora] [--one-by-one]
    PYTHONPATH=. python3 benchmarks/hopper/speculation.py cost OUT.json [--model M] [--layers N] [--drafts 4]
    PYTHONPATH=. python3 benchmarks/hopper/speculation.py verify RESULTS [--model M] [--layers N] [--eager]

`verify` measures verify's axis "speculative decoding" and writes a result file. For the others, all engines start side
by side, each in a part of the GPU's memory; one at a time is timed. OUT.json holds, for `bits`, how many answers differ
from those of the engine without speculation, and the drafts; for `cost`, seconds and tokens.
The weights are random (see child.py). Methods other than n-grams run with a small Llama model, of whose weights their
drafts are made (bi_patch/tools/models/drafts.py). `--beside`: that model, on disk, with weights in FP8, or with
requests that get one of several LoRA adapters in turn, or none.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ACCEPTED, DRAFTED = "vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_draft_tokens"
PREEMPTIONS, HITS = "vllm:num_preemptions", "vllm:prefix_cache_hits"
# The phases of `bits`, by the axis of verify that has the same cause.
_AXES = {"together": "speculative decoding", "cached": "prefix cache", "many": "preemption"}
RANKS, SLOTS = (8, 64, 16), 2  # of adapters: more than slots
_BESIDE = {"fp8": "FP8", "lora": "LoRA"}
_SHARE = 0.1  # of the free memory that an engine asks for at its start
# Each kind uses another part of the sampler. The engine draws from few tokens, so that drafts are accepted.
KINDS: tuple[dict[str, object], ...] = (
    {},
    {"temperature": 0.6, "seed": 1, "top_k": 2},
    {"temperature": 0.3, "seed": 2, "top_p": 0.4},
    {"temperature": 0.8, "seed": -3, "top_k": 4, "top_p": 0.7},
    {"allowed_token_ids": [11, 12, 13, 14]},
    {"allowed_token_ids": [11, 12, 13], "temperature": 1.0, "seed": 4},
    {"repetition_penalty": 1.05, "allowed_token_ids": list(range(50, 60))},
    {"presence_penalty": 0.3, "frequency_penalty": 0.1, "temperature": 0.7, "seed": 5, "top_k": 3},
    {"prompt_logprobs": 1},
    {"logprobs": None, "temperature": 0.5, "seed": 6, "top_k": 2},
    {"min_tokens": 20, "stop_token_ids": list(range(11, 14)), "allowed_token_ids": [11, 12, 13, 14]},
    {"temperature": 0.8, "seed": 7, "top_k": 3, "n": 3},
)


def prompt(tag: int, length: int) -> list[int]:
    """Token ids that repeat themselves, so that n-grams find drafts."""
    source = random.Random(tag)
    part = [source.randrange(100, 4000) for _ in range(23)]
    return (part * (length // 23 + 1))[:length]


def _engine(given: dict):
    if given["armed"]:
        import bi_patch  # noqa: F401  arms before vllm loads
    from vllm import LLM

    from bi_patch.tools.models import shapes

    if given["path"]:
        return LLM(model=given["path"], dtype="bfloat16", disable_log_stats=False, **given["engine"])
    sys.path.insert(0, str(Path(__file__).parent))
    from child import randomize

    overrides = {"num_hidden_layers": given["layers"]} if given["layers"] else {}
    llm = LLM(
        model=shapes.write(given["model"], given["folder"]),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        hf_overrides=overrides,
        disable_log_stats=False,
        **given["engine"],
    )
    llm.apply_model(randomize)
    return llm


def _counters(llm) -> dict[str, float]:
    return {m.name: m.value for m in llm.get_metrics() if m.name in (ACCEPTED, DRAFTED, PREEMPTIONS, HITS)}


def _bits(output) -> list:
    def scores(steps):
        return [s and [[t, v.logprob.hex(), v.rank] for t, v in s.items()] for s in steps or []]

    held = [[list(c.token_ids), scores(c.logprobs), c.finish_reason] for c in output.outputs]
    return [*held, scores(output.prompt_logprobs)]


def bits(llm, adapters: list[str]) -> dict:
    """The answers to every kind together, on a warm cache, and to more requests than the KV cache holds.

    adapters: folders. Requests get one of them in turn, or none.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    held = [None, *(LoRARequest(f"{i}", i, folder) for i, folder in enumerate(adapters, 1))]

    def params(**given):
        return SamplingParams(
            **{"temperature": 0.0, "max_tokens": 48, "ignore_eos": True, "logprobs": 2, "detokenize": False, **given}
        )

    found: dict[str, list] = {}

    def ask(name, prompts, given, first=0):
        loras = [held[(first + i) % len(held)] for i in range(len(prompts))] if adapters else None
        asked = [{"prompt_token_ids": p} for p in prompts]
        outputs = llm.generate(asked, given, use_tqdm=False, lora_request=loras)
        found.update({f"{name} {i}": _bits(o) for i, o in enumerate(outputs)})

    prompts = [prompt(i % 4, 60 + 91 * i) for i in range(len(KINDS))]
    for name in ("together", "cached"):
        ask(name, prompts, [params(**kind) for kind in KINDS])
    for i in (0, 1, 5):
        ask(f"alone {i}", [prompts[i]], [params(**KINDS[i])], first=i)
    many = [prompt(100 + i, 500 + 17 * i) for i in range(40)]
    ask("many", many, [params(**KINDS[i % 8], max_tokens=64) for i in range(40)])
    return {"found": found, "counters": _counters(llm)}


def cost(llm, lock: Path) -> dict:
    """Seconds and tokens of greedy requests, of which some may only choose one token: their text repeats itself."""
    import torch
    from vllm import SamplingParams

    rows = []
    for repeat in range(3):  # the first is not counted: it compiles
        for number, length, tokens in ((1, 512, 128), (16, 512, 128)):
            for free in (True, False):
                given = SamplingParams(
                    temperature=0.0,
                    max_tokens=tokens,
                    ignore_eos=True,
                    detokenize=False,
                    allowed_token_ids=None if free else [77],
                )
                asked = [{"prompt_token_ids": prompt(1000 * repeat + i, length)} for i in range(number)]
                with locked(lock):
                    llm.reset_prefix_cache()
                    before = _counters(llm)
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                    llm.generate(asked, given, use_tqdm=False)
                    seconds = time.perf_counter() - began
                after = _counters(llm)
                rows.append(
                    {
                        "workload": f"{number} x {length}/{tokens}, {'free' if free else 'one token'}",
                        "repeat": repeat,
                        "seconds": seconds,
                        **{name: after.get(name, 0) - before.get(name, 0) for name in (ACCEPTED, DRAFTED)},
                    }
                )
    return {"rows": rows}


@contextlib.contextmanager
def locked(path: Path):
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def child(given: dict) -> None:
    began = time.perf_counter()
    llm = _engine(given)
    started = time.perf_counter() - began
    held = bits(llm, given["adapters"]) if given["what"] == "bits" else cost(llm, Path(given["lock"]))
    import torch
    import vllm

    made = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "vllm": vllm.__version__,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }
    print("RESULT", json.dumps({**held, "start_s": round(started, 1), "measured": made}), flush=True)
    os._exit(0)


def verify(args) -> None:
    """Measure the axis of verify and write its rows. Exits with 1 if positions differ."""
    import bi_patch_entry

    bi_patch_entry.without_arming()
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.models import shapes
    from bi_patch.tools.verify import levels, local

    class Found(evidence.Invariance, kw_only=True):
        variant = "speculation"

    level = replace(levels.FULL, seconds=None, lengths=(3, 40, 290))
    config = shapes.SHAPES[args.model] | ({"num_hidden_layers": args.layers} if args.layers else {})
    label = f"{args.model}{f', {args.layers} layers' if args.layers else ''}{', eager' if args.eager else ''}, n-grams"
    given = {"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 3 << 30, "max_num_batched_tokens": 2048}
    with tempfile.TemporaryDirectory() as root:
        folder = shapes.save(args.model, config, root)
        system = local.local(folder, level, eager=args.eager, random_weights=7, engine_args=given)
        rows, report = invariance.measure(label, system, level, only=("speculative decoding",), tell=print)
    found = evidence.new(Found, report)
    found.rows = rows
    print(evidence.write(found, Path(args.out)), [(r.axis, r.compared, r.differing) for r in rows], flush=True)
    sys.exit(1 if evidence.total_differing(rows) else 0)


def start(args, label: str, armed: bool, method: str, drafts: int, runner: str, folder: Path):
    engine: dict[str, object] = {
        "max_model_len": 9000,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        "gpu_memory_utilization": _SHARE,
        "kv_cache_memory_bytes": (1 << 28 if args.what == "bits" else 4 << 30),
        "enforce_eager": args.eager,
    }
    own = {"prompt_lookup_min": 2, "prompt_lookup_max": 4}
    if not method.startswith("ngram"):
        own = {"model": str(folder / method)}
    if drafts:
        engine["speculative_config"] = {"method": method, "num_speculative_tokens": drafts, **own}
    path = str(folder / "model") if (folder / "model").exists() else ""
    if path:
        engine |= {"max_model_len": 4000, "kv_cache_memory_bytes": 1 << 27}
    adapters = []
    if "fp8" in args.beside:
        engine["quantization"] = "fp8"
    if "lora" in args.beside:
        adapters = [str(folder / f"rank-{rank}") for rank in RANKS]
        engine |= {"enable_lora": True, "max_lora_rank": max(RANKS), "max_loras": SLOTS}
    given = {
        "path": path,
        "what": args.what,
        "model": args.model,
        "layers": args.layers,
        "folder": str(folder),
        "adapters": adapters,
        "armed": armed,
        "lock": args.lock or str(folder / "lock"),
        "engine": engine,
    }
    environ = dict(os.environ) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "BI_PATCH": "1" if armed else "0"}
    environ["VLLM_BATCH_INVARIANT"] = "1" if armed else "0"
    environ["VLLM_USE_V2_MODEL_RUNNER"] = runner
    log = open(f"{args.out}.{label}.log", "w+")
    command = [sys.executable, __file__, "child", json.dumps(given)]
    return subprocess.Popen(command, env=environ, stdout=log, stderr=subprocess.STDOUT), log


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        child(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("bits", "cost", "verify"))
    parser.add_argument("out")
    parser.add_argument("--model", default="Qwen3-8B")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--drafts", default="1,4,8")
    parser.add_argument("--methods", default="ngram")
    parser.add_argument("--beside", type=_parts, default=[], help="what else the engines have: fp8, lora")
    parser.add_argument("--runners", default="1", help="1 for model runner V2, 0 for V1, 1,0 for both")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--one-by-one", action="store_true", help="one engine at a time")
    parser.add_argument("--results", help="a folder, for a result file of the bits")
    parser.add_argument("--lock", default="", help="a file: who holds it may time; by default one of this call")
    parser.add_argument("--limit", type=float, default=280, help="seconds after which the engines are ended")
    args = parser.parse_args()
    if args.what == "verify":
        verify(args)
    folder = Path(f"{args.out}.models")
    folder.mkdir(parents=True, exist_ok=True)
    counts = [int(n) for n in args.drafts.split(",")]
    methods = args.methods.split(",")
    _make(methods, folder, args.beside)
    wanted = [
        (f"{'armed' if armed else 'stock'}-v{1 + int(runner)}-{f'{method} {n}' if n else 0}", armed, method, n, runner)
        for runner in args.runners.split(",")
        for armed in ((True,) if args.what == "bits" else (False, True))
        for method, n in (("ngram", 0), *((method, n) for method in methods for n in counts))
    ]
    running = {} if args.one_by_one else {w[0]: start(args, *w, folder) for w in wanted}
    deadline = time.monotonic() + args.limit
    found: dict[str, object] = {"model": args.model, "layers": args.layers, "eager": args.eager, "methods": methods}
    answers = {}
    for asked in wanted:
        label = asked[0]
        process, log = running.get(label) or start(args, *asked, folder)
        try:
            code = process.wait(max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            code = "late"
        log.seek(0)
        text = log.read()
        made = next((x for x in text.splitlines() if x.startswith("RESULT ")), None)
        if made is None:
            found[label] = {"failed": str(code), "said": text[-2500:]}
        else:
            held = json.loads(made.removeprefix("RESULT "))
            answers[label] = held.pop("found", {})
            found[label] = held
        _compare(found, answers)
        Path(args.out).write_text(json.dumps(found, indent=1))
        print(label, code, {k: v for k, v in found[label].items() if k not in ("rows", "said")}, flush=True)
    if args.results and args.what == "bits":
        keep(args, found, folder)


def _parts(text: str) -> list[str]:
    found = text.split(",") if text else []
    if set(found) - _BESIDE.keys():
        raise argparse.ArgumentTypeError(f"one of {', '.join(_BESIDE)}, or both with a comma, not {text!r}")
    return found


def _make(methods: list[str], folder: Path, beside: list[str]) -> None:
    """Write the small model, its adapters and the drafts of these methods, if something needs them."""
    own = [method for method in methods if not method.startswith("ngram")]
    if not own and not beside:
        return
    import bi_patch_entry

    bi_patch_entry.without_arming()
    from bi_patch.tools.models import adapters, drafts, recipes

    model = recipes.path(recipes.LLAMA_100M)
    (folder / "model").symlink_to(model)
    for method in own:
        drafts.write(method, model, folder / method)
    if "lora" in beside:
        for rank in RANKS:
            adapters.write(model, folder / f"rank-{rank}", seed=rank, rank=rank)


def _compare(found: dict, answers: dict) -> None:
    """For each engine with drafts, count the answers that differ from those of the engine without."""
    for label, held in answers.items():
        plain = answers.get(label.rsplit("-", 1)[0] + "-0")
        if plain and not label.endswith("-0"):
            wrong = [name for name in plain if plain[name] != held.get(name)]
            found[label] |= {"compared": len(plain), "differing": len(wrong), "which": wrong[:20]}
            pairs = [(plain[name], held.get(name)) for name in plain]
            found[label] |= {"positions": sum(_positions(mine) for mine, _ in pairs)}
            found[label] |= {"positions_differing": sum(_positions(mine) for mine, other in pairs if mine != other)}
            found[label]["axes"] = _by_axis(plain, held)
            if wrong:
                found[label]["first"] = _part(plain[wrong[0]], held.get(wrong[0]))


def _by_axis(plain: dict, held: dict) -> dict[str, list[int]]:
    """The positions that are compared and those that differ, by axis."""
    counts: dict[str, list[int]] = {}
    for name, mine in plain.items():
        count = counts.setdefault(_AXES.get(name.split()[0], _AXES["together"]), [0, 0])
        count[0] += _positions(mine)
        count[1] += _positions(mine) * (mine != held.get(name))
    return counts


def _positions(answer: list) -> int:
    """The tokens of an answer, and the prompt tokens that have logprobs."""
    *choices, prompt = answer
    return sum(len(tokens) for tokens, *_ in choices) + sum(bool(step) for step in prompt)


def keep(args, found: dict, folder: Path) -> None:
    """Write the rows of `bits` into a result file. The positions of an answer that differs all count as differing."""
    from types import SimpleNamespace

    import bi_patch_entry

    bi_patch_entry.without_arming()
    from bi_patch.tools import evidence

    class Found(evidence.Invariance, kw_only=True):
        variant = "speculation"

    compared = {label: held for label, held in found.items() if isinstance(held, dict) and "positions" in held}
    if not compared:
        return
    model = "llama-100m" if (folder / "model").exists() else f"{args.model}, {args.layers} layers"
    model += "".join(f", {_BESIDE[part]}" for part in args.beside)
    made = evidence.new(Found, SimpleNamespace(**next(iter(compared.values()))["measured"]))
    notes = []
    for label, held in compared.items():
        runner, drafts = label.split("-")[1:]
        how = f"{model}{', eager' if args.eager else ''}, {drafts} drafts, runner {runner.upper()}"
        counted = held["counters"]
        happened = {"preemption": counted.get(PREEMPTIONS), "prefix cache": counted.get(HITS)}
        for axis, (positions, differing) in held["axes"].items():
            if happened.get(axis, 1):
                row = (how, axis, positions, differing, held.get("first", "") if differing else "")
                made.rows.append(evidence.InvarianceRow(*row))
        notes.append(
            f"{how}: {counted[ACCEPTED]:.0f} of {counted[DRAFTED]:.0f} drafts accepted, {counted[PREEMPTIONS]:.0f} "
            "requests preempted"
        )
    made.note = "; ".join(notes)
    print(evidence.write(made, Path(args.results)), flush=True)


def _part(a: list, b: list | None) -> str:
    """Where two answers part."""
    for mine, other in zip(a, b or []):
        if mine != other:
            if isinstance(mine[0], list) and mine[0] and isinstance(mine[0][0], int):
                at = next((i for i, (x, y) in enumerate(zip(mine[0], other[0])) if x != y), None)
                scores = next((i for i, (x, y) in enumerate(zip(mine[1], other[1])) if x != y), None)
                shown = [part[1][scores] for part in (mine, other)] if scores is not None else ""
                return f"token {at}, scores {scores}: {shown}"
            at = next(i for i, (x, y) in enumerate(zip(mine, other)) if x != y)
            return f"prompt {at}: {mine[at]} and {other[at]}"
    return "another number of answers"


if __name__ == "__main__":
    main()
