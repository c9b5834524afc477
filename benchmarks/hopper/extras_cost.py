"""The cost of what users turn on, on a GPU: LoRA, speculation, embeddings, images; stock and armed engines in turns.

    PYTHONPATH=. python3 benchmarks/hopper/extras_cost.py [--only lora,ngram] [--ready 130] [--limit 190]
        [--results FOLDER]

All engines (extras.py) start at once, each with a KV cache of fixed size. `--ready` seconds later, those whose partner
is not ready end, and the others take turns (engines.py).
"""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import engines
import run
import turns
from extras import LOADS, TITLES
from nursery import Nursery, nurseries

NOTE = "Engines in turns on one GPU: seconds of the engine's steps. (GPU): the kernels' time alone, from one profile"
REPEATS = 5
SCRIPT = str(Path(__file__).with_name("extras.py"))


def group(a: argparse.Namespace, made: Mapping[str, Nursery], kind: str) -> engines.Group:
    """The engines of one kind in the modes of `made`, and its workloads."""
    a.raw.mkdir(parents=True, exist_ok=True)
    children = []
    for mode, nursery in made.items():
        out = a.raw / f"extras-{kind}-{mode}.json"
        out.unlink(missing_ok=True)
        children.append(engines.Child(nursery, TITLES[kind], mode, [SCRIPT, kind, mode, str(out)], out))
    return engines.Group(children, list(LOADS[kind]), REPEATS)


def main() -> None:
    parser = run.options(__doc__)
    parser.add_argument("--only", default=",".join(LOADS))
    parser.add_argument("--ready", type=float, default=130, help="seconds for the start of all engines")
    parser.add_argument("--limit", type=float, default=190, help="seconds until the last workload starts")
    a = parser.parse_args()
    began = time.monotonic()
    with nurseries(("stock", "armed")) as made:
        groups = [group(a, made, kind) for kind in a.only.split(",")]
        for held in engines.ready(groups, began + a.ready):
            engines.measure(held, began + a.limit)
        if not turns.finish(a, groups, NOTE):
            sys.exit("no result file was written")


if __name__ == "__main__":
    main()
