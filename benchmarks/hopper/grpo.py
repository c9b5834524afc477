"""Trains with GRPO twice at once, with other micro-batches and other batch sizes of the sampler.

    PYTHONPATH=. python3 benchmarks/hopper/grpo.py [MODEL] [--steps 200] [--gpus 0,1] [--results FOLDER]

--gpus 0,0 puts both runs on one card: the seconds of a step are then an upper bound. MODEL is a folder, or a name of
bi_patch/tools/models/recipes.py. Every logprob of every step is compared with the sampler's, and the two runs must end
with the same rewards, gradient norms and master weights. It writes parity-*.json.
Exit code 1: a value differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bi_patch_entry

# (sequences in a micro-batch, requests that the sampler runs together) of each run.
SIZES = ((24, 64), (5, 7))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--gpus", default="0,1")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--run", type=int, choices=range(len(SIZES)), help="one of the runs, in this process")
    parser.add_argument("--out", type=Path, help="where --run writes its JSON")
    return parser.parse_args()


def one(a: argparse.Namespace) -> None:
    """One run, in this process: writes {"run", "compared", "differing", "seconds", "info"} as JSON."""
    import msgspec

    from bi_patch.tools.parity import run
    from bi_patch.tools.parity.child import ParityEngine
    from bi_patch.tools.parity.plan import Plan
    from bi_patch.tools.verify import levels
    from bi_patch.tools.verify.local import local

    micro, seats = SIZES[a.run]
    options = {"logprobs_mode": "processed_logprobs", "max_num_seqs": 64} | run.shared()
    if run.shared():  # a GPU: without a look at free memory, since two runs may share a card
        options |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 4 << 30}
    system = local(a.model, levels.QUICK, dtype="bfloat16", eager=False, engine_args=options)
    plan = Plan(steps=a.steps, micro=(micro,), seats=(seats,))  # one run
    with system.start(system.options, kind=ParityEngine) as engine:
        began = time.perf_counter()
        axis = engine.line("GRPO", plan, locate=False)
        seconds = time.perf_counter() - began
        (done,) = engine.runs()
        found = {
            "run": done,
            "compared": axis.compared,
            "differing": axis.differing,
            "seconds": seconds,
            "info": engine.info,
            "model": Path(engine.options.model).name,
        }
    a.out.write_bytes(msgspec.json.encode(found))


def main() -> int:
    a = parse()
    bi_patch_entry.without_arming()
    if a.run is not None:
        one(a)
        return 0
    import msgspec

    from bi_patch.tools import evidence
    from bi_patch.tools.evidence import InvarianceRow, Parity
    from bi_patch.tools.verify.engine import Info

    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{i}.json" for i in range(len(SIZES))]
        started = [
            subprocess.Popen(
                [sys.executable, __file__, a.model, "--steps", str(a.steps), "--run", str(i), "--out", str(out)],
                env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
            )
            for i, (out, gpu) in enumerate(zip(outs, a.gpus.split(",")))
        ]
        if any([p.wait() for p in started]):
            return 2
        first, second = (msgspec.json.decode(out.read_bytes()) for out in outs)
    rows = []
    label = f"{first['model']} bf16 graphs, {a.steps} GRPO steps"
    for (micro, seats), found in zip(SIZES, (first, second)):
        axis = f"GRPO, micro-batches of {micro}, {seats} requests together"
        rows.append(InvarianceRow(label, axis, found["compared"], found["differing"]))
        steps = found["run"]["steps"]
        kl = sum(step["kl"] != 0 for step in steps)
        print(
            f"{axis}: {found['differing']} of {found['compared']:,} differ, {kl} steps with KL, "
            f"{found['seconds'] / a.steps:.2f} s a step, rewards {steps[0]['reward']:.3f} to "
            f"{steps[-1]['reward']:.3f}, master weights {found['run']['masters'][:16]}",
            flush=True,
        )
    pairs = list(zip(first["run"]["steps"], second["run"]["steps"]))
    wrong = sum(x[name] != y[name] for x, y in pairs for name in ("reward", "norm"))
    wrong += first["run"]["masters"] != second["run"]["masters"]
    rows.append(
        InvarianceRow(label, "GRPO rerun: rewards, norms and the hash of the master weights", 2 * len(pairs) + 1, wrong)
    )
    made = evidence.new(Parity, msgspec.convert(first["info"], Info))
    made.rows = rows
    slower = max(first["seconds"], second["seconds"])
    made.note = f"{slower / a.steps:.2f} seconds a step, two runs at once on GPUs {a.gpus}"
    print(evidence.write(made, a.results))
    return 1 if evidence.total_differing(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
