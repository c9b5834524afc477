"""Measures the cost of all models in rounds on one GPU: the engines of a round start side by side, then take turns.

    PYTHONPATH=. python3 benchmarks/hopper/costs.py --limit 560 [--rounds 1,2] [--only Qwen3-8B]... [--plan]
        [--results FOLDER]

A round holds the models whose engines fit on a GPU of 140 GiB together. Engines that are not ready `--start` seconds
after their round began are left out and named. No workload begins after `--limit` seconds, so that one call of limited
time measures the most important models first. Each engine keeps its file of --raw up to date; the result files are
written after each round. --plan prints the rounds, and needs no GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import bi_patch_entry

bi_patch_entry.without_arming()

import child  # noqa: E402
import engines  # noqa: E402
import extras_cost  # noqa: E402
import quantized  # noqa: E402
import run  # noqa: E402
import turns  # noqa: E402
from extras import TITLES  # noqa: E402
from nursery import Nursery, nurseries  # noqa: E402
from schemes import label  # noqa: E402

ONE, EIGHT, MANY, MOST = "1 x 512/128", "8 x 1024/128", "64 x 512/128", "256 x 512/128"
LATENT, LONG = "128 x 512/128", "2 x 32000/64"
SHORT = ("1 x 512/64", "8 x 1024/64", "64 x 512/64", "256 x 512/64")
SHARE = 0.03  # of the GPU's memory that must be free at each start; the KV caches have fixed sizes
MODES = ("stock", "armed")
UPSTREAM = (*MODES, "upstream")
PARTS = (*MODES, "parts")  # armed, and armed with BI_PATCH_TP_INVARIANT
TOGETHER = (
    "The engines of a round start side by side, and times are taken when all have started. "
    "CUDA graphs of the measured sizes alone"
)
NOTE = f"{turns.NOTE}. {TOGETHER}"
OF_RANKS = (
    f"Engines of several GPUs in turns. {TOGETHER}. Ranks are started as by torchrun, each on its own share of the "
    "cores. Engines have vLLM's custom all-reduce and vLLM's own NCCL, without its functions for sleep, and no NVLink "
    "multicast. (GPU) of a decode step: its CUDA graph, replayed 112 times in a row on all ranks, by CUDA events, and "
    "the kernels outside the graph; of a prefill: the kernels, of sums over ranks the shortest of five. Outside a "
    "graph, the least of the ranks' times, for a rank that comes last waits least"
)


@dataclass(frozen=True)
class Entry:
    """A model of the plan.

    gib: an engine's memory in GiB: weights; KV cache; CUDA context, graphs and workspaces. make: starts the engines.
    """

    name: str
    gib: tuple[float, float, float]
    make: Callable[[argparse.Namespace, Mapping[str, Nursery]], engines.Group]
    modes: Sequence[str] = MODES

    @property
    def memory(self) -> float:
        return sum(self.gib) * len(self.modes)


def _given(a: argparse.Namespace, kv_gib: float, workloads: Sequence[str], repeats: int, **more) -> argparse.Namespace:
    few = set() if workloads == SHORT else {1, 2, 4}
    sizes = sorted(few | {int(name.partition(" ")[0]) for name in workloads})
    longest = 33000 if LONG in workloads else 2048
    engine = {"compilation_config": {"cudagraph_capture_sizes": sizes}, "max_num_seqs": sizes[-1]}
    engine["max_num_batched_tokens"] = 8192  # as vLLM's server has it
    given = {"kv_gib": kv_gib, "only": ",".join(workloads), "repeats": a.repeats or repeats, "max_model_len": longest}
    return argparse.Namespace(**vars(a) | given | {"share": SHARE, "engine": engine} | more)


def model(
    name: str, gib: tuple[float, float, float], workloads: Sequence[str], repeats: int = 3, modes: Sequence[str] = MODES
) -> Entry:
    """A name of child.shape."""
    return Entry(name, gib, lambda a, made: turns.group(_given(a, gib[1], workloads, repeats), made, name), modes)


def scheme(
    name: str,
    gib: tuple[float, float, float],
    workloads: Sequence[str] = (MANY, MOST, ONE, EIGHT),
    layers: int = 6,
    modes: Sequence[str] = MODES,
) -> Entry:
    """Quantized weights: a name of schemes.py."""

    def make(a: argparse.Namespace, made: Mapping[str, Nursery]) -> engines.Group:
        return quantized.group(_given(a, gib[1], workloads, 3, layers=layers), made, name)

    return Entry(label(name, layers), gib, make, modes)


def over(ranks: int, entry: Entry) -> Entry:
    """The same with tensor parallelism over `ranks` GPUs. gib: of each GPU."""

    def make(a: argparse.Namespace, made: Mapping[str, Nursery]) -> engines.Group:
        return entry.make(argparse.Namespace(**vars(a) | {"ranks": ranks}), made)

    return replace(entry, name=f"{entry.name}, TP {ranks}", make=make)


def extra(kind: str, weights_gib: float) -> Entry:
    """A kind of extras.py."""
    return Entry(TITLES[kind], (weights_gib, 2, 2.5), lambda a, made: extras_cost.group(a, made, kind))


QUANTIZED = (3.5, 4.0, 2.5)
# The first round leaves memory to others that use the GPU while it starts.
ROUNDS: list[list[Entry]] = [
    [
        model("Qwen3-8B", (15.3, 9.0, 3.0), (ONE, EIGHT, MANY, LONG)),
        scheme("AWQ", QUANTIZED),
        scheme("FP8 block", QUANTIZED, modes=UPSTREAM),
    ],
    [
        model("Llama-3.2-1B", (2.4, 2.5, 2.0), (ONE, EIGHT, MANY, LONG), repeats=5),
        model("Qwen3-30B-A3B, 12 layers", (15.5, 2.0, 3.0), (ONE, EIGHT, MANY, LONG)),
        scheme("FP8 channel", QUANTIZED, modes=UPSTREAM),
        extra("lora", 3),
    ],
    [
        model("Qwen3-Next-80B-A3B, 8 layers", (26.5, 14.0, 4.5), (ONE, EIGHT, MANY, MOST, LONG)),
        model("Falcon-H1-7B, 8 layers", (4.5, 7.0, 3.0), (LONG, EIGHT, MANY, ONE)),
    ],
    [
        model("DeepSeek-V2-Lite", (29.3, 3.0, 3.5), (ONE, EIGHT, MANY, LATENT, LONG), modes=UPSTREAM),
        extra("eagle3", 0.5),
    ],
    [
        extra("ngram", 4),
        extra("embed", 1.5),
        model("Granite-4.0-H-Small, 8 layers", (12.5, 10.0, 3.5), (ONE, EIGHT, MANY, LONG)),
        extra("images", 2),
        scheme("W4A16", QUANTIZED, modes=UPSTREAM),
    ],
    # DeepGEMM's kernels and many certificates: its engines take the longest to start, 272 s with empty caches
    # (--start 330), 44 s with full ones.
    [
        scheme("FP8 block MLA", (17.0, 1.0, 5.0), (ONE, EIGHT, MANY, LATENT, LONG), layers=4, modes=UPSTREAM),
        scheme("W8A16", QUANTIZED, modes=UPSTREAM),
        scheme("FP8 static", QUANTIZED, modes=UPSTREAM),
    ],
    [
        scheme("FP8 block experts", (5.0, 4.0, 2.5), modes=UPSTREAM),
        scheme("FP8 channel experts", (5.0, 4.0, 2.5), modes=UPSTREAM),
        scheme("MXFP4", (4.5, 4.0, 2.5), modes=UPSTREAM),
    ],
    [
        model("Kimi-Linear-48B-A3B, 4 layers", (13.0, 6.0, 4.0), (ONE, EIGHT, MANY, LONG)),
        scheme("NVFP4", QUANTIZED),
        scheme("FP8 KV cache", (5.0, 4.0, 2.5), (MANY, MOST, ONE, EIGHT, LONG), modes=UPSTREAM),
        scheme("GPTQ", QUANTIZED, modes=UPSTREAM),
    ],
    [
        scheme("INT8", QUANTIZED, modes=UPSTREAM),
        scheme("FP8 tensor", QUANTIZED, modes=UPSTREAM),
        scheme("NVFP4 experts", (3.5, 4.0, 2.5)),
        scheme("W4A16 experts", (3.5, 4.0, 2.5), modes=UPSTREAM),
    ],
]
OF_ONE = list(range(1, len(ROUNDS) + 1))
# Only by their numbers: two GPUs, then four.
ROUNDS += [
    [
        over(2, model("Qwen3-8B, 8 layers", (3.0, 3.0, 3.0), SHORT)),
        over(2, model("Qwen3-30B-A3B, 4 layers", (3.2, 2.0, 3.0), SHORT)),
        over(2, scheme("FP8 block", (1.9, 2.0, 2.5), SHORT, layers=4)),
        over(2, scheme("FP8 block experts", (2.3, 2.0, 2.5), SHORT, layers=4)),
    ],
    [
        over(4, model("Qwen3-8B, 8 layers", (1.5, 3.0, 3.0), SHORT)),
        over(4, model("Qwen3-30B-A3B, 4 layers", (1.6, 2.0, 3.0), SHORT)),
    ],
]
# One GPU again.
ROUNDS.append([model("Qwen3-8B, 8 layers", (5.2, 5.3, 2.5), (MANY, MOST, ONE, EIGHT), modes=PARTS)])
OF_ONE.append(len(ROUNDS))


def plan(a: argparse.Namespace) -> Iterator[list[Entry]]:
    """The rounds of --rounds, with the models whose names contain a text of --only. --together: as one round."""
    rounds = [
        [e for e in ROUNDS[number - 1] if not a.only or any(text in e.name for text in a.only)] for number in a.rounds
    ]
    if a.together:
        rounds = [[entry for entries in rounds for entry in entries]]
    yield from filter(None, rounds)


def unknown(a: argparse.Namespace) -> str:
    """What the arguments name and no round has, in words; "" for nothing."""
    names = [entry.name for number in a.rounds for entry in ROUNDS[number - 1]]
    said = [f"--only {text!r}" for text in a.only or () if not any(text in name for name in names)]
    said += [f"--modes {mode!r}" for mode in a.modes.split(",") if mode not in child.MODES]
    return ", ".join(said)


def begin(entries: Sequence[Entry], a: argparse.Namespace, made: Mapping[str, Nursery]) -> list[engines.Group]:
    """Start a round's engines. A model whose engines cannot be made is left out."""
    print(f"round: {sum(e.memory for e in entries):.0f} GiB for {', '.join(e.name for e in entries)}", flush=True)
    groups = []
    for entry in entries:
        try:
            groups.append(entry.make(a, {mode: made[mode] for mode in entry.modes if mode in made}))
        except (Exception, SystemExit) as error:
            print(f"not started: {entry.name}: {error!r}", flush=True)
    return groups


def main() -> None:
    parser = run.options(__doc__)
    parser.add_argument("--rounds", type=_numbers, default=OF_ONE)
    parser.add_argument("--only", action="append", help="models whose name contains this text; repeatable")
    parser.add_argument("--together", action="store_true", help="start the models of all --rounds at once")
    parser.add_argument("--modes", default=",".join(child.MODES))
    parser.add_argument("--repeats", type=int, help="of each workload; by default, as planned")
    parser.add_argument("--start", type=float, default=170, help="seconds for the start of the first round")
    parser.add_argument("--later", type=float, default=120, help="seconds for the start of a later round")
    parser.add_argument("--limit", type=float, default=560, help="begin no workload after so many seconds")
    parser.add_argument("--phase", type=Path, help="a file that says whether engines start or are timed")
    parser.add_argument("--plan", action="store_true", help="print the rounds, and start nothing")
    a = parser.parse_args()
    if (said := unknown(a)) or a.limit <= 0:
        parser.error(f"no round has {said}" if said else "--limit leaves no time")
    if a.plan:
        for entries in plan(a):
            print(*(f"{e.name}: {', '.join(m for m in e.modes if m in a.modes.split(','))}" for e in entries), sep="\n")
            print()
        return
    began, rounds, done = time.monotonic(), list(plan(a)), []

    def say(phase: str) -> None:
        print(f"{time.monotonic() - began:.0f} s: {phase}", flush=True)
        if a.phase:
            a.phase.write_text(phase)

    say("starts")
    one = {*a.rounds} & {*OF_ONE}
    note = ". ".join([NOTE] * bool(one) + [OF_RANKS] * bool({*a.rounds} - one))
    modes = [mode for mode in a.modes.split(",") if any(mode in e.modes for entries in rounds for e in entries)]
    with nurseries(modes) as made:
        for number, entries in enumerate(rounds):
            allowed = a.later if number else a.start
            deadline = time.monotonic() + min(allowed, began + a.limit - time.monotonic())
            groups = begin(entries, a, made)
            if done:
                turns.finish(a, done, note)
            started = engines.ready(groups, deadline)
            say(f"times of {', '.join(held.children[0].model for held in started) or 'nothing'}")
            # The first repeat, which also has the GPU's times, of every model before the next.
            for repeats, words in ((range(1), "once"), (range(1, engines.ALL.stop), "again")):
                for held in started:
                    engines.measure(held, began + a.limit, repeats)
                    say(f"measured {words} {held.children[0].model}")
            done += groups
            for held in groups:
                held.kill()
            say("starts")
            if time.monotonic() > began + a.limit:
                break
        say("ends")
        turns.finish(a, done, note)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
