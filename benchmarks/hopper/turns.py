"""Measures the cost of a model with engines of several modes in turns on one GPU.

    PYTHONPATH=. python3 benchmarks/hopper/turns.py [--model Llama-3.2-1B] [--repeats 5]

A decode step of a small model is mostly the host's time. The host's time drifts by tens of percent from minute to
minute and from process to process. So the engines run at once, and each repeat of one engine is followed by the same
repeat of the others. The drift then affects all engines. Each engine has a fixed KV cache, and all must fit on the
GPU: for 8B models, give --kv-gib 12, and --only with workloads that fit into this cache.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence

import engines
import run
from child import COST, MODES, workloads
from nursery import Nursery, nurseries
from peers import UNFUSED

NOTE = (
    "Engines in turns on one GPU. (GPU): the kernels' time alone, from one profile of 16 steps: of each launch of a "
    "decode step the median of the steps"
)


def group(
    a: argparse.Namespace, made: Mapping[str, Nursery], model: str, *flags: str, label: str = ""
) -> engines.Group:
    """The engines of `model` in the modes of `made`, and the workloads that `a.only` names.

    a: kv_gib, the KV cache of each engine, share, of the GPU's memory that must be free at each start, engine, further
    arguments of vllm.LLM, ranks, the GPUs of each engine, and the options of run.py.
    """
    # A fixed KV cache: vLLM's measurement of free memory would be wrong while the other engine starts.
    given = {"kv_cache_memory_bytes": int(a.kv_gib * 2**30), "gpu_memory_utilization": a.share}
    given |= getattr(a, "engine", {})
    if (ranks := getattr(a, "ranks", 1)) > 1:
        given["compilation_config"] = run.EXTRA["compilation_config"] | given.get("compilation_config", {}) | UNFUSED
        label, flags = f"{label or model}, TP {ranks}", (*flags, "--ranks", str(ranks))
        a = argparse.Namespace(**vars(a) | {"raw": a.raw / f"tp{ranks}"})
    measured, children = workloads(a.only, a.max_model_len), []
    flags += ("--only", ",".join(measured))
    for mode, nursery in made.items():
        out, (_, *command) = run.engine(a, model, mode, "--turns", *flags, **given)
        children.append(engines.Child(nursery, label or model, mode, command, out))
    return engines.Group(children, measured, a.repeats)


def finish(a: argparse.Namespace, groups: Sequence[engines.Group], note: str = NOTE) -> bool:
    """End the groups' engines and write the result files. Returns False if none was written."""
    for held in groups:
        held.kill()
    files = [file for held in groups for file in held.files]
    return bool(files) and run.report(a, files, ". ".join((note, *(m for held in groups for m in held.missing))))


def main() -> None:
    parser = run.options(__doc__)
    parser.add_argument("--model", default="Llama-3.2-1B", help="a name of SHAPES")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--modes", default="stock,armed", help=f"of {', '.join(MODES)}")
    parser.add_argument("--only", help=f"comma-separated workloads of {', '.join(COST)}")
    parser.add_argument("--kv-gib", type=float, default=24, help="KV cache of each engine")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs of each engine")
    parser.add_argument("--share", type=float, default=0.4, help="of the GPU's memory that must be free at each start")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no workload after so many seconds")
    a = parser.parse_args()
    begin = time.monotonic()
    with nurseries(a.modes.split(",")) as made:
        held = group(a, made, a.model)
        if not engines.ready([held], begin + engines.START_S, frozenset(made)):
            sys.exit("not every engine started")
        engines.measure(held, begin + a.seconds)
        written = finish(a, [held])
    if not written or held.missing:
        sys.exit("the measurement is not complete" if written else "no result file was written")


if __name__ == "__main__":
    main()
