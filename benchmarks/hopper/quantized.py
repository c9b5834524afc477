"""Measures models with quantized weights on one GPU: few layers of real shapes with random weights, and tiny models.

    PYTHONPATH=. python3 benchmarks/hopper/quantized.py verify [SCHEME ...] [--layers 4] [--results FOLDER]
    PYTHONPATH=. python3 benchmarks/hopper/quantized.py cost [SCHEME ...] [--layers 8] [--results FOLDER]

SCHEME is a name of schemes.py. For `verify`, a tiny model of recipes.QUANTIZED is one, too: it has files, so its
products are compared with fp64 on the checkpoint's dequantized weights, if --axes is left out. `verify` runs `bi-patch
verify` of all schemes beside each other; --until ends a run early, and its file holds the axes that were complete.
`cost` starts an engine of each of --modes for each scheme, all at once, and measures those that start in turns
(turns.py).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import bi_patch_entry

bi_patch_entry.without_arming()

import engines  # noqa: E402
import run  # noqa: E402
import schemes  # noqa: E402
import turns  # noqa: E402
from nursery import Nursery, nurseries  # noqa: E402
from until import ending  # noqa: E402

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
    from bi_patch.tools.models import recipes, shapes
    from bi_patch.tools.verify import levels, local

    level = replace(levels.QUICK, seconds=None, graphs=1)
    given = {"gpu_memory_utilization": a.share, "kv_cache_memory_bytes": CACHE, "max_num_batched_tokens": 2048}
    with tempfile.TemporaryDirectory() as root:
        if scheme in recipes.QUANTIZED:
            folder, label, seed = str(recipes.path(scheme)), scheme, None
        else:
            folder = shapes.save("model", schemes.config(scheme, a.layers), root)
            label, seed, given = schemes.label(scheme, a.layers), SEED, given | schemes.arguments(scheme)
        system = local.local(folder, level, mode=a.mode, eager=a.eager, random_weights=seed, engine_args=given)
        label += (", eager" if a.eager else "") + (f", {a.mode}" if a.mode != "armed" else "")
        only = a.axes.split(",") if a.axes else () if seed is None else AXES  # verify compares products if it is empty
        with ending(a.until):
            rows, report = invariance.measure(label, system, level, only=only, tell=told, cut=a.until > 0)
    if report.precision is not None:
        told(f"{label}: {report.precision.words()}")
    found = evidence.new(evidence.Invariance, report)
    found.rows, found.command = rows, "python3 benchmarks/hopper/quantized.py verify"
    found.command += f" --mode {a.mode}" if a.mode != "armed" else ""
    if len(rows) < len(only) or 0 < a.until <= time.time():
        found.note = f"{label}: complete axes of a run that was cut"
    evidence.write(found, a.results)
    return evidence.total_differing(rows)


def told(text: str) -> None:
    print(text, flush=True)


def verify(a: argparse.Namespace) -> int:
    """Verify every scheme in a process of its own, at once. Their rows join one result file."""
    from bi_patch.tools import evidence
    from bi_patch.tools.models import shapes

    def alone(scheme: str) -> int:
        start = time.perf_counter()
        own = a.results / "schemes" / shapes.short(scheme)  # processes must not write to the same file
        own.mkdir(parents=True, exist_ok=True)
        flags = ["--results", str(own), "--share", str(a.memory / len(a.schemes)), "--layers", str(a.layers)]
        flags += ["--memory", str(a.memory), "--until", str(a.until)]
        flags += ["--mode", a.mode] + ["--eager"] * a.eager + (["--axes", a.axes] if a.axes else [])
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


def group(a: argparse.Namespace, made: Mapping[str, Nursery], scheme: str) -> engines.Group:
    """The engines of one scheme, and the workloads that `a.only` names."""
    given = argparse.Namespace(**vars(a) | {"raw": a.raw / scheme.replace(" ", "-")})
    flags = ("--scheme", scheme, "--layers", str(a.layers))
    return turns.group(given, made, schemes.SCHEMES[scheme][0], *flags, label=schemes.label(scheme, a.layers))


def cost(a: argparse.Namespace) -> int:
    begin = time.monotonic()
    with nurseries(a.modes.split(",")) as made:
        a.share = a.memory / len(made) / len(a.schemes)
        groups = [group(a, made, scheme) for scheme in a.schemes]
        needed = engines.COMPARED & set(made)  # upstream's mode does not run every scheme
        started = engines.ready(groups, begin + engines.START_S, needed)
        for held in started:
            engines.measure(held)
        written = turns.finish(a, groups)
    return not written or len(started) < len(groups)


def main() -> None:
    parser = run.options(__doc__)
    parser.set_defaults(max_model_len=4096)
    parser.add_argument("what", choices=("verify", "cost"))
    parser.add_argument("schemes", nargs="*", default=list(schemes.SCHEMES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--axes", default="", help="comma-separated axes of verify")
    parser.add_argument("--until", type=int, default=0, help="of verify: end the run then, seconds since 1970")
    parser.add_argument("--mode", default="armed", help="of verify: armed, or upstream for a scheme that is refused")
    parser.add_argument("--share", type=float, help="verify one scheme in this process, with this share of the memory")
    parser.add_argument("--memory", type=float, default=0.9, help="the share of the GPU's memory for all engines")
    parser.add_argument("--modes", default="stock,armed,upstream", help="of cost: stock, armed, upstream")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kv-gib", type=float, default=3, help="of cost: KV cache of each engine")
    parser.add_argument(
        "--only", default="1 x 512/128,8 x 1024/128,64 x 512/128,256 x 1024/256", help="comma-separated workloads"
    )
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
