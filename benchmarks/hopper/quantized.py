"""Measures models with quantized weights on one GPU: few layers of real shapes, random weights.

    PYTHONPATH=. python3 benchmarks/hopper/quantized.py verify [SCHEME ...] [--layers 4] [--results FOLDER]
    PYTHONPATH=. python3 benchmarks/hopper/quantized.py cost [SCHEME ...] [--layers 8] [--results FOLDER]

SCHEME is a name of schemes.py. `verify` runs `bi-patch verify` of all schemes beside each other. `cost` starts an
engine of each of --modes for each scheme, all at once, and measures them in turns (turns.py).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import bi_patch_entry

bi_patch_entry.without_arming()

import run  # noqa: E402
import schemes  # noqa: E402
import turns  # noqa: E402
from child import workloads  # noqa: E402

AXES = (
    "batch size",
    "mixed lengths",
    "co-batch contents",
    "prefix cache",
    "chunk budget",
    "decode = prefill",
    "preemption",
)
AXES += ("restart", "eager and compiled")
SEED, CACHE = 7, 1 << 30


def measure(scheme: str, a: argparse.Namespace) -> int:
    """Measure one scheme's invariance and write its rows. Returns the number of positions that differ."""
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.models import shapes
    from bi_patch.tools.verify import levels, local

    level = replace(levels.QUICK, seconds=None, graphs=1)
    given = {"gpu_memory_utilization": a.share, "kv_cache_memory_bytes": CACHE, "max_num_batched_tokens": 2048}
    with tempfile.TemporaryDirectory() as root:
        folder = shapes.save("model", schemes.config(scheme, a.layers), root)
        system = local.local(
            folder, level, eager=a.eager, random_weights=SEED, engine_args=given | schemes.arguments(scheme)
        )
        label = schemes.label(scheme, a.layers) + (", eager" if a.eager else "")
        rows, report = invariance.measure(label, system, level, only=a.axes.split(",") if a.axes else AXES, tell=print)
    found = evidence.new(evidence.Invariance, report)
    found.rows, found.command = rows, "python3 benchmarks/hopper/quantized.py verify"
    evidence.write(found, a.results)
    return evidence.total_differing(rows)


def verify(a: argparse.Namespace) -> int:
    """Verify every scheme in a process of its own, at once. Their rows join one result file."""
    from bi_patch.tools import evidence
    from bi_patch.tools.models import shapes

    def alone(scheme: str) -> int:
        start = time.perf_counter()
        own = a.results / "schemes" / shapes.short(scheme)  # processes must not write to the same file
        own.mkdir(parents=True, exist_ok=True)
        flags = ["--results", str(own), "--share", str(a.memory / len(a.schemes)), "--layers", str(a.layers)]
        flags += ["--memory", str(a.memory)] + ["--eager"] * a.eager + (["--axes", a.axes] if a.axes else [])
        with open(own / "log.txt", "w") as log:
            code = subprocess.run(
                [sys.executable, __file__, "verify", scheme, *flags], stdout=log, stderr=log
            ).returncode
        last = [line for line in (own / "log.txt").read_text().splitlines() if line.strip()][-1:]
        print(f"[{code}] {scheme}: {''.join(last)[:400]} ({time.perf_counter() - start:.0f} s)", flush=True)
        return code

    with ThreadPoolExecutor(len(a.schemes)) as pool:
        codes = list(pool.map(alone, a.schemes))
    for file in sorted((a.results / "schemes").glob("*/invariance-*.json")):
        print(evidence.write(evidence.read(file, evidence.Invariance), a.results))
    return max(codes)


class Child(turns.Child):
    """An engine of one scheme and mode, which measures when asked."""

    def __init__(self, a: argparse.Namespace, scheme: str, mode: str, count: int):
        given = argparse.Namespace(raw=a.raw / scheme.replace(" ", "-"), max_model_len=4096, kv_gib=3)
        given.model, given.share = schemes.SCHEMES[scheme][0], a.memory / count
        super().__init__(given, mode, "--scheme", scheme, "--layers", str(a.layers))


def cost(a: argparse.Namespace) -> int:
    modes = a.modes.split(",")
    pairs = {s: [Child(a, s, mode, len(modes) * len(a.schemes)) for mode in modes] for s in a.schemes}
    outs = []
    try:
        for scheme, children in pairs.items():
            try:
                for child in children:
                    child.wait("turn ready", turns.START_S)
                for name in workloads(a.only, 4096):
                    for repeat in range(a.repeats):
                        for child in children[:: 1 if repeat % 2 == 0 else -1]:
                            child.measure(name, repeat)
                for child in children:
                    child.finish()
            except Exception as error:
                print(f"{scheme}: {type(error).__name__}: {error}", flush=True)
                continue
            outs += [child.out for child in children]
            run.report(a, outs, turns.NOTE)
    finally:
        for children in pairs.values():
            for child in children:
                child.process.kill()
    return len(outs) != len(modes) * len(a.schemes)


def main() -> None:
    parser = run.options(__doc__)
    parser.add_argument("what", choices=("verify", "cost"))
    parser.add_argument("schemes", nargs="*", default=list(schemes.SCHEMES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--axes", default="", help="comma-separated axes of verify")
    parser.add_argument("--share", type=float, help="verify one scheme in this process, with this share of the memory")
    parser.add_argument("--memory", type=float, default=0.9, help="the share of the GPU's memory for all engines")
    parser.add_argument("--modes", default=",".join(turns.MODES), help="of cost: stock, armed, upstream")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="1 x 512/128,8 x 1024/128,64 x 512/128", help="comma-separated workloads")
    a = parser.parse_args()
    a.results.mkdir(parents=True, exist_ok=True)
    if a.what == "cost":
        sys.exit(cost(a))
    if a.share is None:
        sys.exit(verify(a))
    (scheme,) = a.schemes
    differing = measure(scheme, a)
    print(f"{scheme}: {differing} differ")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
