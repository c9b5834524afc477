"""Trains with GRPO twice at once, with other micro-batches and other batch sizes of the sampler.

    PYTHONPATH=. python3 benchmarks/hopper/grpo.py [MODEL] [--steps 200] [--gpus 0,1] [--results FOLDER]
        [--resume FOLDER] [--seconds 300] [--micro 24,5] [--seats 64,7] [--tokens 24]

--gpus 0,0 puts both runs on one card: the seconds of a step are then an upper bound. MODEL is a folder, or a name of
bi_patch/tools/models/recipes.py. Every logprob of every step is compared with the sampler's, and the two runs must have
the same rewards, gradient norms and master weights after each step. It prints progress and writes parity-*.json.

--micro: sequences in a micro-batch of each run. --seats: requests that each run's sampler runs together. --tokens: in
each of the 24 answers of a step.

--seconds: each run stops after the first step that ends later than this, the engine's start included.
--resume FOLDER: each run leaves a checkpoint there (master weights, optimizer, steps). The same command goes on from it
with new engines, up to --steps.

Exit code 0: nothing differs, and all steps are done. 1: a value differs. 2: a run failed. 3: steps are left.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from pathlib import Path

import bi_patch_entry

_LOOK, _EVERY = 5.0, 10  # seconds between looks at the progress; steps between two lines
# The sampler of a run: short prompts and answers, and few sizes of graphs, so that it starts in time.
_ENGINE = {"max_model_len": 512, "max_num_batched_tokens": 1024}
_GRAPHS = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 12, 16, 24, 32]}}
# What the nursery imports before it forks the runs.
_MODULES = (
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "transformers.models.llama.modeling_llama",
    "bi_patch.tools.parity.worker",
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--gpus", default="0,1")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--resume", type=Path, help="the folder of checkpoints")
    parser.add_argument("--seconds", type=float, default=0.0, help="of this call; 0: no limit")
    parser.add_argument("--eager", action="store_true", help="a sampler without compilation")
    parser.add_argument("--micro", type=_pair, default=(24, 5))
    parser.add_argument("--seats", type=_pair, default=(64, 7))
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--run", type=int, choices=(0, 1), help="one of the runs, in this process")
    parser.add_argument("--out", type=Path, help="where --run writes its JSON")
    parser.add_argument("--began", type=float, default=time.time(), help="when this call began")
    return parser.parse_args()


def _pair(text: str) -> tuple[int, ...]:
    found = tuple(map(int, text.split(",")))
    if len(found) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers, one for each run")
    return found


def one(a: argparse.Namespace) -> None:
    """One run, in this process, which is armed: writes {"run", "info", "model"} as JSON."""
    os.environ["CUDA_VISIBLE_DEVICES"] = a.gpus.split(",")[a.run]
    import bi_patch  # noqa: F401  arms before vLLM loads, if this process is no fork

    began = time.perf_counter()
    import msgspec

    from bi_patch.tools.parity import run, worker
    from bi_patch.tools.parity.plan import Ask, Plan
    from bi_patch.tools.verify import levels
    from bi_patch.tools.verify.engine import LocalEngine
    from bi_patch.tools.verify.local import local
    from bi_patch.tools.verify.report import PASSED

    micro, seats = a.micro[a.run], a.seats[a.run]
    options = {"logprobs_mode": "processed_logprobs", "max_num_seqs": 64} | _ENGINE | run.shared()
    if run.shared():  # a GPU: without a look at free memory, since two runs may share a card
        options |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 4 << 30}
        options |= {} if a.eager else _GRAPHS
    system = local(a.model, levels.QUICK, dtype="bfloat16", eager=a.eager, engine_args=options)
    engine = LocalEngine(system.options)
    if engine.info.mode != "armed":
        sys.exit(f"run {a.run}: the engine is {engine.info.mode}")
    session = worker.session(engine)
    spent = time.perf_counter() - began
    print(f"run {a.run}: sampler and trainer started in {spent:.0f} s", flush=True)
    gc.collect()
    gc.freeze()  # what vLLM made stays, and no step needs to look through it
    left = max(a.seconds - (time.time() - a.began), 1.0) if a.seconds else 0.0
    sizes = {"micro": (micro,), "seats": (seats,), "tokens": a.tokens}
    plan = Plan(steps=a.steps, **sizes, folder=str(a.resume.absolute()), seconds=left)
    axis = worker.measure(session, Ask("GRPO", plan, locate=False))
    if axis.state != PASSED:
        print(f"run {a.run}: {axis.state}: {axis.reason} {axis.shown}", flush=True)
    (done,) = (made for made, _ in session.runs)
    found = {"run": done, "info": engine.info, "model": Path(engine.options.model).name}
    made = a.out.with_suffix(".part")
    made.write_bytes(msgspec.json.encode(found))
    made.rename(a.out)
    sys.stdout.flush()
    os._exit(0)


def runs(process: int) -> bool:
    """Whether the process is there. The nursery leaves no zombies."""
    return Path(f"/proc/{process}").exists()


def watch(started: list[int], folder: Path, pairs: list[tuple[int, int]]) -> None:
    """Print a line for some steps of each run, until all have ended. folder: of the checkpoints. pairs: of the runs."""
    from bi_patch.tools.parity.checkpoints import progress

    shown = [len(progress(folder, *sizes)) for sizes in pairs]
    while True:
        ended = not any(map(runs, started))
        for i, sizes in enumerate(pairs):
            told = progress(folder, *sizes)
            if len(told) < shown[i] + (1 if ended else _EVERY):
                continue
            new, shown[i] = told[shown[i] :], len(told)
            parts = {
                name: sum(getattr(t.spent, name) for t in new) / len(new) for name in new[0].spent.__struct_fields__
            }
            print(
                f"run {i}, step {new[-1].at}: {sum(t.step.differing for t in new)} differ, reward "
                f"{new[-1].step.reward:.3f}, {sum(parts.values()):.2f} s a step: "
                + ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items()),
                flush=True,
            )
        if ended:
            return
        time.sleep(_LOOK)


def main() -> int:
    a = parse()
    if a.run is not None:
        one(a)
        return 0
    bi_patch_entry.without_arming()
    with tempfile.TemporaryDirectory() as folder:
        return both(a, Path(folder))


def both(a: argparse.Namespace, folder: Path) -> int:
    """Both runs, in processes of their own. folder: for what this call needs no longer than it runs."""
    began = time.time()
    import msgspec
    from nursery import nurseries

    from bi_patch.tools import evidence
    from bi_patch.tools.evidence import InvarianceRow, Parity
    from bi_patch.tools.parity.plan import Run
    from bi_patch.tools.verify import levels
    from bi_patch.tools.verify.engine import Info
    from bi_patch.tools.verify.local import local

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    outs = [folder / f"{i}.json" for i in (0, 1)]
    kept = a.resume or folder
    with nurseries(["armed"], _MODULES) as made:  # vLLM is imported while the model is made
        model = local(a.model, levels.QUICK).options.model
        again = [__file__, model, *(["--eager"] if a.eager else []), "--gpus", a.gpus, "--began", str(began)]
        again += [
            "--tokens",
            str(a.tokens),
            "--steps",
            str(a.steps),
            "--resume",
            str(kept),
            "--seconds",
            str(a.seconds),
        ]
        again += [f"--micro={a.micro[0]},{a.micro[1]}", f"--seats={a.seats[0]},{a.seats[1]}"]
        with open(os.devnull) as nothing:
            started = [
                made["armed"].fork([*again, "--run", str(i), "--out", str(out)], nothing.fileno(), 1)
                for i, out in enumerate(outs)
            ]
            watch(started, kept, list(zip(a.micro, a.seats)))
    if not all(out.is_file() for out in outs):
        return 2
    found = [msgspec.json.decode(out.read_bytes()) for out in outs]
    runs = [msgspec.convert(held["run"], Run) for held in found]
    count = min(len(run.steps) for run in runs)
    rows = []
    label = f"{found[0]['model']} bf16 {'eager' if a.eager else 'graphs'}, {count} GRPO steps"
    for run in runs:
        axis = f"GRPO, micro-batches of {run.micro}, {run.seats} requests together"
        done = run.steps[:count]
        compared, differing = (sum(getattr(step, name) for step in done) for name in ("compared", "differing"))
        rows.append(InvarianceRow(label, axis, compared, differing))
        mean = {
            name: sum(getattr(s, name) for s in run.spent) / len(run.spent)
            for name in ("sample", "train", "update", "sync")
        }
        print(
            f"{axis}: {differing} of {compared:,} differ, {sum(step.kl != 0 for step in done)} steps with KL, "
            f"{sum(mean.values()):.2f} s a step ({mean}), rewards {done[0].reward:.3f} to {done[-1].reward:.3f}, "
            f"{run.calls} calls, master weights {run.masters[:16]}",
            flush=True,
        )
    pairs = list(zip(runs[0].steps, runs[1].steps))
    names = ("reward", "norm", "masters")
    wrong = sum(getattr(x, name) != getattr(y, name) for x, y in pairs for name in names)
    whole = len(runs[0].steps) == len(runs[1].steps)
    wrong += whole and runs[0].masters != runs[1].masters
    axis = "GRPO rerun: rewards, norms and the master weights of each step"
    rows.append(InvarianceRow(label, axis, len(names) * len(pairs) + whole, wrong))
    made = evidence.new(Parity, msgspec.convert(found[0]["info"], Info))
    made.rows = rows
    made.note = "; ".join(
        f"micro-batches of {run.micro}: {sum(s.total for s in run.spent) / len(run.spent):.2f} seconds a step in "
        f"{run.calls} call{'s' * (run.calls > 1)}"
        for run in runs
    )
    made.note += f"; two runs at once on GPUs {a.gpus}"
    print(evidence.write(made, a.results))
    return 1 if evidence.total_differing(rows) else 3 * (count < a.steps)


if __name__ == "__main__":
    sys.exit(main())
