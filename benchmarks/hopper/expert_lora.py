"""LoRA of a model with experts on a GPU: bits along the axes of a batch, and times.

    python benchmarks/hopper/expert_lora.py plain ANSWERS [--eager]
    python benchmarks/hopper/expert_lora.py lora ANSWERS RESULTS [--eager]
    python benchmarks/hopper/expert_lora.py times MODE OUT.json [--after FILE] [--lock FILE]

The shape is Qwen3-30B-A3B's with two layers and 32 experts, and random weights. Adapters have ranks 8 to 64: on
attention and experts, on attention alone, and with embeddings and the head. `plain` starts an engine without LoRA and
keeps its answers in the file ANSWERS. `lora` starts an engine with LoRA, runs the axes with an adapter for each
request, waits for ANSWERS, and compares requests without an adapter with it; it writes an invariance file into the
folder RESULTS. Exit code 1: positions differ. `times`: MODE is stock, upstream or armed; four layers with 128 experts
and four adapters of rank 16. It starts the engine, waits until FILE exists, and times decode steps of 1, 8 and 64
requests with adapters in turn, and prefill: seconds by the clock, the least of three runs, and of the kernels alone.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path

import lora_engine

LAYERS, EXPERTS, VOCABULARY = 2, 32, 32000
AXES = ("batch size", "late arrivals", "chunk budget", "prefix cache", "decode = prefill", "prompt logprobs")


def _model(layers: int, experts: int) -> str:
    from bi_patch.tools.models import shapes

    shape = {**shapes.SHAPES["Qwen3-30B-A3B"], "num_hidden_layers": layers, "num_experts": experts}
    return shapes.save("experts with adapters", shape | {"vocab_size": VOCABULARY}, tempfile.mkdtemp())


def bits(asked) -> None:
    lora_engine.start("armed")
    import msgspec

    from bi_patch.tools import evidence
    from bi_patch.tools.evidence import Invariance, InvarianceRow
    from bi_patch.tools.verify.answers import Answer
    from bi_patch.tools.verify.engine import LocalEngine
    from bi_patch.tools.verify.probes import FEATURE_PROBES, PROBES, Workload, adapters
    from bi_patch.tools.verify.probes.base import NotExercised, Result

    class Found(Invariance, kw_only=True):
        variant = property(lambda self: "expert-lora")

    @dataclasses.dataclass(frozen=True)
    class Adapted(Workload):
        """A workload whose requests have the adapters in turn, and whose fillers have them or none."""

        folders: tuple[str, ...] = ()

        def greedy(self, index):
            return super().greedy(index).but(lora=self.folders[(index + 1) % len(self.folders)])

        def filler(self, index, **changes):
            given = ("", *self.folders)
            return super().filler(index, **{"lora": given[index % len(given)], **changes})

    options = lora_engine.options(_model(LAYERS, EXPERTS), asked.eager, 1 << 30, max_cpu_loras=8)
    off = next(p for p in FEATURE_PROBES if isinstance(p, adapters.WithoutProbe))
    on = next(p for p in FEATURE_PROBES if p.name == "LoRA")
    given = {"lengths": (3, 37, 150, 411), "generate": 8, "sizes": (1, 2, 3, 8, 9, 17, 33, 40), "prefix": 200}
    load = Workload.random(VOCABULARY, **given)
    if asked.part == "plain":
        engine = LocalEngine(options)
        part = asked.answers.with_suffix(".part")
        part.write_bytes(msgspec.msgpack.encode(off.collect(engine, load)))
        part.rename(asked.answers)
        os._exit(0)
    change = lora_engine.change(off, options)
    extra = {**change.options["extra"], "max_loras": 3}  # fewer than adapters, and several beside each other
    engine = LocalEngine(options.but(extra=extra))
    label = f"Qwen3-30B-A3B ({LAYERS} layers, {EXPERTS} experts) LoRA{' eager' if asked.eager else ''}"
    rows, failed = [], False

    def keep(result: Result) -> None:
        rows.append(InvarianceRow(label, result.axis, result.compared, result.differing, result.first))
        found = evidence.new(Found, engine.info)
        found.rows = rows
        evidence.write(found, asked.results)
        print(
            f"{time.monotonic() - BEGAN:.0f} s {label}: {result.axis} {result.differing}/{result.compared}", flush=True
        )
        if result.differing:
            print(result.first, flush=True)

    adapted = Adapted(**{f.name: getattr(load, f.name) for f in dataclasses.fields(load)})
    adapted = dataclasses.replace(adapted, folders=adapters.adapters(engine), budgets=(33, 256))
    for probe, workload in [(on, load), *((p, adapted) for name in AXES for p in PROBES if p.name == name)]:
        try:
            keep(probe.run(engine, workload))
        except NotExercised as error:
            failed = True
            print(f"{label}: {probe.name}: {error}", flush=True)
    while not asked.answers.exists():
        time.sleep(0.5)
    expected = msgspec.msgpack.decode(asked.answers.read_bytes(), type=list[Answer])
    got = off.collect(engine, load, change)
    keep(Result.of(off.name, off.cases(change, off.requests(engine, load), expected, got)))
    sys.stdout.flush()
    os._exit(1 if failed or any(row.differing for row in rows) else 0)


def times(asked) -> None:
    lora_engine.start(asked.mode)
    from bi_patch.tools.models import adapters

    layers, experts, count, rank = 4, 128, 4, 16
    model = _model(layers, experts)
    folders = [
        adapters.write(model, Path(tempfile.mkdtemp()), seed=i, rank=rank, experts=True, embedded=i == count - 1)
        for i in range(count)
    ]
    clock = lora_engine.Clock(lora_engine.engine(model, count, rank, 0.15), folders)
    said = f"Qwen3-30B-A3B ({layers} layers), {count} adapters of rank {rank}"
    found = lora_engine.about(asked.mode, model=said)
    clock.run(8, 16, 2, True)
    print(f"{time.monotonic() - BEGAN:.0f} s {asked.mode} is ready", flush=True)
    while asked.after and not asked.after.exists():
        time.sleep(0.2)
    clock.measure(found, asked.out, 3, asked.lock)
    told = {name: found[name] for name in ("seconds", "gpu seconds")}
    print(f"{time.monotonic() - BEGAN:.0f} s {asked.mode}: {told}", flush=True)
    os._exit(0)


BEGAN = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("plain", "lora"):
        part = parts.add_parser(name)
        part.add_argument("answers", type=Path)
        part.add_argument("--eager", action="store_true")
        if name == "lora":
            part.add_argument("results", type=Path)
    part = parts.add_parser("times")
    part.add_argument("mode", choices=lora_engine.MODES)
    part.add_argument("out", type=Path)
    part.add_argument("--after", type=Path)
    part.add_argument("--lock", type=Path)
    asked = parser.parse_args()
    times(asked) if asked.part == "times" else bits(asked)


if __name__ == "__main__":
    main()
