"""Measures on a GPU what single requests ask for, and weights, keys and values that lie in the host's memory.

    PYTHONPATH=. python3 benchmarks/hopper/features.py [CASE ...] [--results FOLDER]

CASE: a key of CASES, by default all. "single requests": each alone and in company (cpu/request_kinds.py). "KV offload":
prompts whose keys and values left the GPU's cache and come back from the host's memory, against the same prompts on an
empty cache; also in company, with more tokens behind them, and sampled. "weights on the host": engines with
--cpu-offload-gb and --offload-group-size against an engine whose weights are on the GPU. Exit code 1: positions differ,
or something else failed.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import bi_patch_entry

bi_patch_entry.without_arming()  # the engines run in processes of their own
sys.path.insert(0, str(Path(__file__).parents[1]))
import single_requests  # noqa: E402

from bi_patch.errors import BiPatchError  # noqa: E402

MEMORY = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 30}
GRAPHS = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128]}}
LOADED = "vllm:external_prefix_cache_hits"  # vLLM's counter of tokens that a connector brought back
OFFLOADED = 1 << 30  # bytes of the host's memory for keys and values
ROOM = 3000  # tokens that the GPU's cache holds
LENGTHS = (120, 333, 700, 64, 1000)


class Case(NamedTuple):
    """what: SINGLE, WEIGHTS, or the connector of KV offload."""

    what: str
    eager: bool = True


SINGLE, WEIGHTS = "single requests", "weights on the host"
KINDS = (SINGLE, "OffloadingConnector", "SimpleCPUOffloadConnector", WEIGHTS)
CASES = {f"{what}, {mode}": Case(what, mode == "eager") for mode in ("eager", "compiled") for what in KINDS}
# Arguments of vllm.LLM: by zero copy for half of the weights, and with every layer brought to the GPU before its turn.
ON_HOST: dict[str, dict[str, object]] = {
    "--cpu-offload-gb": {"cpu_offload_gb": 0.1},
    "--offload-group-size": {"offload_group_size": 1},
}

# What vLLM says of each when weights went to the host.
_TELLS = {
    "--cpu-offload-gb": "Total CPU offloaded parameters",
    "--offload-group-size": "[PrefetchOffloader] Initialized",
}


def single(label: str, case: Case) -> tuple[list, list[str], SimpleNamespace]:
    """The rows of single requests, what failed otherwise, and what the file says of the machine."""
    import torch
    import vllm

    from bi_patch.tools.models import recipes

    arguments = MEMORY | {"enforce_eager": case.eager} | ({} if case.eager else GRAPHS)
    folder = str(recipes.path(recipes.QWEN3_100M))
    environ = {"PYTHONPATH": os.environ.get("PYTHONPATH", ".")}
    name = f"{recipes.QWEN3_100M} bf16, {label}"
    rows, wrong = single_requests.measured(folder, "bfloat16", name, environ, arguments)
    here = SimpleNamespace(
        device=torch.cuda.get_device_name(),
        vllm=vllm.__version__,
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
    )
    return rows, wrong, here


def offload(label: str, case: Case) -> tuple[list, list[str], object]:
    """The rows of an engine with KV offload, nothing, and the engine's Info. Raises NotExercised if the engine brought
    no tokens back."""
    from bi_patch.tools.models import recipes
    from bi_patch.tools.verify.child import ARMED, ChildEngine
    from bi_patch.tools.verify.engine import Options
    from bi_patch.tools.verify.probes import NotExercised

    transfer = {
        "kv_connector": case.what,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": OFFLOADED},
    }
    options = Options(
        str(recipes.path(recipes.QWEN3_100M)),
        eager=case.eager,
        max_model_len=2048,
        max_num_seqs=32,
        chunk=512,
        kv_blocks=ROOM // 16,
        extra=MEMORY | {"kv_transfer_config": transfer} | ({} if case.eager else GRAPHS),
    )
    with ChildEngine(ARMED, options, environ=dict(os.environ)) as engine:
        pairs, loaded = compared(engine)
        info = engine.info
    print(f"{label}: {loaded:.0f} tokens came back from the host", flush=True)
    if loaded <= 0:
        raise NotExercised(f"{label}: the counter {LOADED} did not move")
    return [row(f"{recipes.QWEN3_100M} bf16, {label}", axis, held) for axis, held in pairs.items()], [], info


def compared(engine) -> tuple[dict[str, list], float]:
    """Pairs of answers by axis, and how many tokens came back from the host."""
    from bi_patch.tools.verify.answers import Request

    source = random.Random(11)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(source.randrange(100, 1900) for _ in range(count))

    plain = [Request(tokens(n), max_tokens=8, logprobs=3) for n in LENGTHS]
    drawn = [r.but(temperature=0.8, seed=40 + i) for i, r in enumerate(plain)]
    longer = [r.but(prompt=r.prompt + tokens(90)) for r in plain]
    scored = [r.but(prompt_logprobs=1) for r in plain]
    company = [Request(tokens(n), max_tokens=6, logprobs=1) for n in (5, 40, 17, 150)]

    def alone(requests: Sequence[Request]) -> list:
        found = []
        for request in requests:
            forget(engine)
            found += engine.generate([request])
        return found

    expected = {id(r): a for kind in (plain, drawn, longer, scored) for r, a in zip(kind, alone(kind), strict=True)}
    forget(engine)
    engine.generate(plain)
    before = engine.counters().get(LOADED, 0.0)
    pairs: dict[str, list] = {}

    def ask(axis: str, requests: Sequence[Request], beside: Sequence[Request] = ()) -> None:
        for _ in range(0, 3 * ROOM, 1000):  # three times what the GPU's cache holds
            engine.generate([Request(tokens(1000), max_tokens=1)])
        answers = engine.generate([*beside[:2], *requests, *beside[2:]])[len(beside[:2]) :]
        pairs.setdefault(axis, []).extend((expected[id(r)], a) for r, a in zip(requests, answers))

    for request in plain:
        ask("offloaded prefix", [request])
    for turn in range(2):
        ask("offloaded prefix, in a batch", plain[:: 1 - 2 * turn], company)
        ask("offloaded prefix, sampled", drawn[:: 1 - 2 * turn], company)
        ask("offloaded prefix and more tokens", longer[:: 1 - 2 * turn], company)
        ask("prompt logprobs of offloaded positions", scored[:: 1 - 2 * turn], company)
    return pairs, engine.counters().get(LOADED, 0.0) - before


def forget(engine) -> None:
    """Empty the cache, and with it the host's memory. Refused while keys and values are on their way to the host, so
    some engine steps follow a refusal."""
    from bi_patch.tools.verify.answers import Request

    for last in (*[False] * 20, True):
        try:
            engine.reset_cache()
            return
        except BiPatchError:
            if last or not engine.alive():
                raise
            time.sleep(0.05)
            engine.generate([Request((7, 8, 9), max_tokens=2)])


def row(label: str, axis: str, pairs: Sequence[tuple]):
    from bi_patch.tools.evidence import InvarianceRow
    from bi_patch.tools.verify.answers import compare

    found = [compare(a, b) for a, b in pairs]
    first = next((f.first for f in found if f.differing), "")
    return InvarianceRow(label, axis, sum(f.compared for f in found), sum(f.differing for f in found), first)


def weights(label: str, case: Case) -> tuple[list, list[str], object]:
    """The rows of engines with weights in the host's memory, nothing, and the Info of the engine without. The engines
    start side by side. Raises NotExercised if vLLM does not say that weights went to the host."""
    from concurrent.futures import ThreadPoolExecutor

    from bi_patch.tools.models import recipes
    from bi_patch.tools.verify.child import ARMED, ChildEngine
    from bi_patch.tools.verify.engine import Options
    from bi_patch.tools.verify.probes import NotExercised, Workload
    from bi_patch.tools.verify.probes.crossing import everything

    folder = str(recipes.path(recipes.QWEN3_100M))

    def answers(name: str, extra: dict[str, object]):
        given = MEMORY | extra | ({} if case.eager else GRAPHS)
        options = Options(folder, eager=case.eager, max_model_len=1024, max_num_seqs=64, chunk=512, extra=given)
        with ChildEngine(ARMED, options, environ=dict(os.environ)) as engine:
            said = [line for line in Path(engine._log.name).read_text().splitlines() if _TELLS.get(name, "-") in line]
            if name and not said:
                raise NotExercised(f"{label}: the engine with {name} moved no weights")
            print(f"{name}: {said[-1][-200:]}" if name else "", flush=True)
            load = Workload.random(
                engine.info.vocab_size,
                lengths=(3, 40, 290),
                generate=12,
                sizes=(2, 17),
                fillers=63,
                filler_lengths=(2, 5, 9, 17),
                long=0,
                prefix=200,
            )
            return engine.generate(everything(engine, load)), engine.info

    with ThreadPoolExecutor(1 + len(ON_HOST)) as pool:
        (plain, info), *held = pool.map(answers, ("", *ON_HOST), ({}, *ON_HOST.values()))
    rows = [
        row(
            f"{recipes.QWEN3_100M} bf16, {name}, {'eager' if case.eager else 'compiled'}",
            WEIGHTS,
            list(zip(plain, found)),
        )
        for name, (found, _) in zip(ON_HOST, held, strict=True)
    ]
    return rows, [], info


def measure(label: str, results: Path) -> bool:
    """Measure one case and write its rows. Returns whether everything was measured and no position differs."""
    from bi_patch.tools import evidence

    class Found(evidence.Invariance, kw_only=True):
        variant = property(lambda self: "features")

    case = CASES[label]
    try:
        rows, wrong, here = {SINGLE: single, WEIGHTS: weights}.get(case.what, offload)(label, case)
    except (BiPatchError, OSError, RuntimeError) as error:
        print(f"{label}: {type(error).__name__}: {error}", flush=True)
        return False
    for held in rows:
        print(f"{label}: {held.axis}: {held.differing} of {held.compared} differ {held.first}", flush=True)
    for text in wrong:
        print(f"{label}: {text}", flush=True)
    if rows:
        found = evidence.new(Found, here)
        found.rows, found.command = rows, "benchmarks/hopper/features.py"  # cases share a file
        print(evidence.write(found, results), flush=True)
    return bool(rows) and not wrong and not evidence.total_differing(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    sys.exit(0 if all([measure(label, args.results) for label in args.cases]) else 1)


if __name__ == "__main__":
    main()
