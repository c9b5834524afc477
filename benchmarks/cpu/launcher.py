"""Measures armed engines whose two ranks an external launcher starts (as torchrun does), on CPU, one thread each.

    PYTHONPATH=. python3 -P benchmarks/cpu/launcher.py [LABEL ...] [--results FOLDER]

Each rank is a process of its own that makes an engine with `distributed_executor_backend="external_launcher"`. Every
rank does the same: axes of verify, and a batch whose answers are compared between the ranks, bit by bit. The rows join
one result file of the day. Exit code 1: a position differs, or a rank failed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import bi_patch_entry

RANKS, SECONDS = 2, 300
AXES = (
    *("batch size", "mixed lengths", "co-batch contents", "prefix cache", "shared prefix", "chunk budget"),
    *("decode = prefill", "prompt logprobs", "seeded sampling"),
)
ENVIRON = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # vLLM asks for it with an external launcher
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_BATCH_INVARIANT": "1",
    "BI_PATCH": "1",
}


class Case(NamedTuple):
    """model: a name of recipes.NAMES."""

    model: str
    eager: bool = True


CASES = {
    "tiny-qwen3 bf16 TP 2, external launcher": Case("tiny-qwen3"),
    "tiny-qwen3 bf16 TP 2, external launcher, compiled": Case("tiny-qwen3", eager=False),
}


def rank(model: str, eager: bool, out: Path) -> None:
    """One rank: run the axes, and keep their results and the answers of a batch."""
    import bi_patch

    bi_patch.arm()
    from bi_patch.tools.bench import launched
    from bi_patch.tools.verify.engine import LocalEngine, Options

    extra = {"tensor_parallel_size": RANKS, "distributed_executor_backend": "external_launcher", "seed": 0}
    engine = LocalEngine(Options(model, eager=eager, max_model_len=1024, chunk=512, tokenizer=False, extra=extra))
    out.write_text(json.dumps(launched.kept(engine, AXES)))


def start(model: str, eager: bool, folder: Path) -> list[dict]:
    """What each rank kept. Raises RuntimeError if a rank fails, TimeoutExpired if one takes too long."""
    from bi_patch.tools.bench import launched

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    files = [folder / f"{number}.json" for number in range(RANKS)]
    running = []
    for number, file in enumerate(files):
        place = {"RANK": number, "WORLD_SIZE": RANKS, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environ = os.environ | ENVIRON | {name: str(value) for name, value in place.items()}
        # -P: beside this file lies a requests.py, which is not the library that vLLM imports
        command = [sys.executable, "-P", __file__, "--rank", model, json.dumps(eager), str(file)]
        running.append(subprocess.Popen(command, env=environ))
    launched.wait(running, SECONDS)
    return [json.loads(file.read_text()) for file in files]


def measure(label: str, results: Path) -> int:
    """Measure one case and write its rows. Returns the number of positions that differ."""
    import msgspec

    from bi_patch import settings
    from bi_patch.tools import evidence
    from bi_patch.tools.models import recipes
    from bi_patch.tools.verify.answers import Answer, compare

    class Ranks(evidence.Invariance, kw_only=True):
        variant = property(lambda self: "launcher")

    case = CASES[label]
    with tempfile.TemporaryDirectory() as folder:
        model = str(recipes.path(case.model, cache=settings.read().cache))
        one, other = start(model, case.eager, Path(folder))
    pairs = zip(*(msgspec.convert(held["answers"], list[Answer]) for held in (one, other)), strict=True)
    found = [compare(*pair) for pair in pairs]
    rows = [*one["rows"], ["both ranks", sum(f.compared for f in found), sum(f.differing for f in found), ""]]
    for axis, compared, differ, first in rows:
        print(f"{label}: {axis}: {differ} of {compared} differ {first}", flush=True)
    made = evidence.new(Ranks, SimpleNamespace(**one["info"]))
    made.rows = [evidence.InvarianceRow(label, *row) for row in rows]
    made.command = "python3 -P benchmarks/cpu/launcher.py"  # the cases share a file
    evidence.write(made, results)
    return evidence.total_differing(made.rows)


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))
        return
    bi_patch_entry.without_arming()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", nargs="*", default=list(CASES))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    sys.exit(1 if sum([measure(label, args.results) for label in args.labels]) else 0)


if __name__ == "__main__":
    main()
