"""Bits of an engine with LoRA on a GPU: the axes "LoRA" and "LoRA off", with one start for each of the two engines.

    python benchmarks/hopper/lora_bits.py plain|lora ANSWERS RESULTS [--layers 4] [--eager]

`plain` starts an engine without LoRA and keeps its answers in the file ANSWERS. `lora` starts an engine with LoRA,
measures both axes and writes an invariance file into the folder RESULTS. Shape: Llama-3.1-8B with few layers and random
weights. Exit code 1: positions differ.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import lora_engine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("plain", "lora"))
    parser.add_argument("answers", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--eager", action="store_true")
    asked = parser.parse_args()
    lora_engine.start("armed")
    import msgspec

    from bi_patch.tools import evidence
    from bi_patch.tools.evidence import Invariance, InvarianceRow
    from bi_patch.tools.models import shapes
    from bi_patch.tools.verify.answers import Answer
    from bi_patch.tools.verify.engine import LocalEngine
    from bi_patch.tools.verify.probes import FEATURE_PROBES, Workload, adapters
    from bi_patch.tools.verify.probes.base import Result

    class Found(Invariance, kw_only=True):
        variant = property(lambda self: "lora")

    shape = {**shapes.SHAPES["Llama-3.1-8B"], "num_hidden_layers": asked.layers, "vocab_size": 32000}
    model = shapes.save("Llama-3.1-8B, few layers", shape, tempfile.mkdtemp())
    options = lora_engine.options(model, asked.eager, 2 << 30)
    off = next(p for p in FEATURE_PROBES if isinstance(p, adapters.WithoutProbe))
    on = next(p for p in FEATURE_PROBES if p.name == "LoRA")
    load = Workload.random(32000, lengths=(3, 37, 150, 411, 1030), generate=12, sizes=(1, 2, 3, 8, 9, 16, 17, 33, 40))
    if asked.part == "plain":
        engine = LocalEngine(options)
        asked.answers.write_bytes(msgspec.msgpack.encode(off.collect(engine, load)))
        os._exit(0)
    change = lora_engine.change(off, options)
    engine = LocalEngine(options.but(**change.options))
    label = f"Llama-3.1-8B ({asked.layers} layers) LoRA{' eager' if asked.eager else ''}"
    rows = []

    def keep(result: Result) -> None:
        rows.append(InvarianceRow(label, result.axis, result.compared, result.differing, result.first))
        found = evidence.new(Found, engine.info)
        found.rows = rows
        print(evidence.write(found, asked.results), result, flush=True)

    keep(on.run(engine, load))
    if asked.answers.exists():
        expected = msgspec.msgpack.decode(asked.answers.read_bytes(), type=list[Answer])
        got = off.collect(engine, load, change)
        keep(Result.of(off.name, off.cases(change, off.requests(engine, load), expected, got)))
    sys.stdout.flush()
    os._exit(1 if any(row.differing for row in rows) else 0)


if __name__ == "__main__":
    main()
