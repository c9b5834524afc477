"""Plant every fault of this machine's platform, one by one, and write what verification made of each.

    python -m bi_patch.tools.faults                      # on CPU: about two minutes
    python -m bi_patch.tools.faults --platform cuda      # on a GPU host: a model of real shape, random weights
    python -m bi_patch.tools.faults --only "num_splits 0,split-K for few rows"
    python -m bi_patch.tools.faults --write-docs         # docs/faults.md anew from the newest files

Writes faults-<date>-<platform>-vllm-<release>.json under --out, whole: nothing of an earlier run stays in it. Exit code
0: every fault was caught and named and nothing differed without one; 1: not so.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from bi_patch import settings
from bi_patch.errors import UnsupportedFeature
from bi_patch.files import write_json
from bi_patch.tools import evidence
from bi_patch.tools.evidence import FaultRow, Faults
from bi_patch.tools.faults import Fault, catch, every
from bi_patch.tools.faults.compiled import AXIS, CAUSE, NAME, catch_compiled
from bi_patch.tools.faults.lifts import RECURRENT
from bi_patch.tools.models import recipes, shapes
from bi_patch.tools.verify.child import ARMED, PATIENT, ChildEngine
from bi_patch.tools.verify.engine import Options, short_name

# The tracer's rows are those of model runner V1, which serves the same layers.
_ENVIRON = {"cpu": {}, "cuda": {"VLLM_USE_V2_MODEL_RUNNER": "0"}}


def options(platform: str, folder: str, dtype: str = "") -> Options:
    """The engine that faults are planted in: MoE, tied routers and head, eager so that it can be traced.

    dtype: by default fp32 on CPU, where every change of order shows in the bits, and bf16 on CUDA.
    """
    if platform == "cpu":
        return Options(
            str(recipes.path(recipes.MOE, cache=settings.read().cache)),
            dtype=dtype or "float32",
            max_model_len=1024,
            chunk=512,
            tied=True,
            digests=True,
            extra={"hf_overrides": {"num_experts_per_tok": 4}},
        )
    return Options(
        shapes.write(shapes.WIDE_MOE, folder),
        dtype=dtype or "bfloat16",
        max_model_len=2048,
        chunk=2048,
        tied=True,
        digests=True,
        tokenizer=False,
        random_weights=7,
        extra={"gpu_memory_utilization": 0.3, "kv_cache_memory_bytes": 8 << 30},
    )


def few_blocks(given: Options, block: int) -> Options:
    """The same with a KV cache that holds one request, so that a batch is preempted."""
    short = given.but(max_model_len=min(given.max_model_len, 1024))
    return short.but(kv_blocks=-(-short.max_model_len // block) + 1)


def run(
    given: Options, platform: str, only: set[str], environ: dict[str, str], keep: Callable[[Faults], object]
) -> Faults:
    """Two engines: one for most faults, one with few KV blocks. Prints a line for each fault.

    keep: given what is known after each engine.
    """
    wanted = [f for f in every() if platform in f.platforms and (not only or f.name in only)]
    rows: list[FaultRow] = []
    pairs = differing = 0
    with ChildEngine(ARMED, given, environ=environ) as engine:
        made = evidence.new(Faults, engine.info)
        block = engine.info.block_size
        load = catch.workload(engine)
        rows += [_row(engine, fault, load) for fault in wanted if fault.axis != catch.PREEMPTION]
        axes = {fault.axis for fault in wanted} - {catch.PREEMPTION, catch.PRECISION, catch.RESTART}
        made.rows = list(rows)
        keep(made)
        made.clean = pairs, differing = _clean(engine, axes, load)
        keep(made)
    if any(fault.axis == catch.PREEMPTION for fault in wanted):
        with ChildEngine(ARMED, few_blocks(given, block), environ=environ) as engine:
            load = catch.workload(engine)
            rows += [_row(engine, fault, load) for fault in wanted if fault.axis == catch.PREEMPTION]
            more = _clean(engine, {catch.PREEMPTION}, load)
            pairs, differing = pairs + more[0], differing + more[1]
    made.rows = sorted(rows, key=lambda row: (row.cause, row.planted))
    made.clean = (pairs, differing)
    keep(made)
    return made


def _row(engine: ChildEngine, fault: Fault, load) -> FaultRow:
    platform = "cpu" if engine.info.platform == "cpu" else "cuda"
    emulated = platform in fault.emulated
    try:
        found = catch.catch(engine, fault.name, load)
    except Exception as error:
        if not engine.alive():
            raise
        traceback.print_exc()
        row = FaultRow(fault.cause, fault.name, False, False, fault.axis, emulated, located=f"{error}")
    else:
        row = FaultRow(fault.cause, fault.name, found.caught, found.right, fault.axis, emulated, located=found.named)
    state = "caught and named" if row.caught and row.named else "caught, named wrongly" if row.caught else "NOT CAUGHT"
    located = row.located.replace("\n", "\n   ")
    print(f"{row.cause:2} {row.planted}: {state} ({row.axis})\n   {located}", flush=True)
    return row


def _clean(engine: ChildEngine, axes: set[str], load) -> tuple[int, int]:
    pairs = differing = 0
    for axis in sorted(axes):
        for case in catch.cases(engine, axis, load):
            pairs += 1
            differing += case.differs
            if case.differs:
                print(f"without a fault: {axis}: {case.label}: {case.difference.first}", flush=True)
    print(f"without a fault: {differing} of {pairs} pairs differ", flush=True)
    return pairs, differing


def recurrent(folder: str) -> Options:
    """A small model with gated delta nets, for which vLLM's kernels start their chunks where the engine step does."""
    return Options(
        shapes.write(shapes.HYBRID, folder),
        max_model_len=1024,
        chunk=512,
        tokenizer=False,
        random_weights=1,
        prefix_caching=False,
    )


def refused(folder: str, environ: dict[str, str]) -> FaultRow:
    """Cause 24 as it is kept out: a model with recurrent layers must not start."""
    planted, said = "a model with recurrent layers", ""
    try:
        ChildEngine(ARMED, recurrent(folder), environ=environ).close()
    except UnsupportedFeature as error:
        said = str(error).split(":")[0]
    print(f"24 {planted}: {'refused by ' + said if said else 'NOT REFUSED'}", flush=True)
    return FaultRow(24, planted, bool(said), bool(said), "start", refused=bool(said), located=said)


def lifted(folder: str, environ: dict[str, str]) -> FaultRow:
    """Cause 24 with the refusal lifted: vLLM's own kernel is the fault."""
    with ChildEngine(ARMED, recurrent(folder), environ=environ, lifts=(RECURRENT,)) as engine:
        found = catch.catch_recurrent(engine, catch.workload(engine))
    print(f"24 {found.fault}, refusal lifted: caught {found.caught}, named {found.right}\n   {found.named}", flush=True)
    return FaultRow(
        24, "recurrent layers, the refusal lifted", found.caught, found.right, found.axis, located=found.named
    )


def compiled(given: Options, environ: dict[str, str], platform: str) -> tuple[FaultRow, tuple[int, int]]:
    """Cause 17, and the pairs of its axis without it: how many, and how many differ."""
    clean = catch_compiled(given, environ, platform, planted=False)
    found = catch_compiled(given, environ, platform)
    print(f"17 {found.fault}: caught {found.caught}, named {found.right}\n   {found.named}", flush=True)
    print(f"without a fault: {clean.first or 'no pair differs'}", flush=True)
    row = FaultRow(found.cause, found.fault, found.caught, found.right, found.axis, located=found.named)
    return row, (clean.compared, int(clean.caught))


def write(found: Faults, name: str, folder: Path) -> Path:
    """The result file of one device, model and dtype, in place of an earlier one of the same day. Returns its path."""
    path = folder / evidence.file_name(found, name)
    write_json(path, found)
    return path


def write_docs(folder: Path, page: Path) -> None:
    """The tables of docs/faults.md from the newest file of each platform."""
    text = page.read_text()
    for platform in evidence.platforms(Faults, folder):
        mark = f"faults-{platform}"
        if f"<!-- {mark} -->" not in text:
            text += f"\n## On {platform}\n\n<!-- {mark} -->\n<!-- /{mark} -->\n"
        table = evidence.faults_table(evidence.newest(Faults, folder, platform))
        text = evidence.replace_between(text, mark, table)
    page.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=evidence.RESULTS, help="folder of the result file")
    parser.add_argument("--only", default="", help="names of faults, comma separated; writes no file")
    parser.add_argument("--dtype", choices=("", "bfloat16", "float32", "float16"), default="")
    parser.add_argument("--no-compile", action="store_true", help="leave out the fault that needs torch.compile")
    parser.add_argument("--write-docs", action="store_true", help="only write docs/faults.md from the newest files")
    a = parser.parse_args()
    if a.write_docs:
        write_docs(a.out, Path("docs/faults.md"))
        return 0
    if a.platform == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--platform cuda: torch sees no GPU here")
    only = {name.strip() for name in a.only.split(",") if name.strip()}
    environ = PATIENT | dict(os.environ) | _ENVIRON[a.platform]
    with tempfile.TemporaryDirectory(prefix="bi_patch-faults-") as folder:
        given = options(a.platform, folder, a.dtype)
        short = {"": "", "bfloat16": "-bf16", "float32": "-fp32", "float16": "-fp16"}[a.dtype]

        def keep(found: Faults) -> Path | None:
            name = "cpu" if a.platform == "cpu" else short_name(found.device)
            found.rows.sort(key=lambda row: (row.cause, row.planted))
            return None if only else write(found, name + short, a.out)

        found = run(given, a.platform, only, environ, keep)
        if not only:
            found.rows.append(refused(folder, environ))
            if a.platform == "cpu":
                found.rows.append(lifted(folder, environ))
            if not a.no_compile:
                try:
                    row, clean = compiled(given, environ, a.platform)
                except Exception:  # one engine that does not start must not cost the file of the others
                    traceback.print_exc()
                    row, clean = FaultRow(CAUSE, NAME, False, False, AXIS), (0, 0)
                found.rows.append(row)
                found.clean = (found.clean[0] + clean[0], found.clean[1] + clean[1])
            print(keep(found))
    caught, refusals = evidence.faults_caught(found.rows)
    print(
        f"{caught} of {evidence.CAUSES} causes caught and named, {refusals} more refused by name; "
        f"without a fault {found.clean[1]} of {found.clean[0]} pairs differ"
    )
    return 0 if all(row.caught and row.named for row in found.rows) and not found.clean[1] else 1


if __name__ == "__main__":
    sys.exit(main())
