"""Measures the invariance of armed engines of several GPUs of one host: tensor, pipeline and data parallelism.

    PYTHONPATH=. python3 benchmarks/hopper/parallel.py [LABEL ...] [--results FOLDER] [--models FOLDER]

Without labels, every case of rank_cases.py is measured, one after the other. Shapes are real, with few layers and
seeded random weights, which every engine loads from one file; each rank makes weights that are quantized, or of a model
with recurrent layers, by itself, and the ranks' parts differ. "tensor parallel size" compares 2 ranks with 1 (on hosts
of four GPUs with 4, too), with BI_PATCH_TP_INVARIANT=8. data_ranks.py says what engines of data parallelism are asked,
and executors.py how ranks of other executors are compared; servers.py measures a server with several front ends. The
rows join one result file of the day. Exit code 1: a position differs, or an axis has no result.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import data_ranks
import executors
import schemes
import servers
from rank_cases import CASES, EXPERTS, FRONT, LAYERS, MEMORY, RECURRENT, SEED, SIZES_OF_GRAPHS, SMALL, SMALL_SHAPE, Case

import bi_patch_entry


def folder(model: str, root: Path, layers: int = 0) -> Path:
    """The folder of a model with weights, of a name of schemes.py or RECURRENT without; it is made once.

    layers: by default those of LAYERS, and two of a name of schemes.py. A name of RECURRENT has four.
    """
    from bi_patch.tools.models import shapes
    from bi_patch.tools.verify import checkpoint

    if model == FRONT:
        return Path()  # servers.py makes it
    if model in RECURRENT:
        import families

        from bi_patch.tools.models.families import FAMILIES

        shape = FAMILIES[model] | families.SIZES[model] | RECURRENT[model]
        return Path(shapes.save(f"{model} {os.getpid()}", shape, root))
    if model not in LAYERS:
        return Path(shapes.save(f"{model} {os.getpid()}", schemes.config(model, layers or 2), root))
    layers = layers or LAYERS[model]
    name = f"{model}, {layers} layers"
    made = root / f"{shapes.short(name)}-weights"
    if not (made / "done").exists():
        known = shapes.SHAPES["DeepSeek-V3, 4 layers"] | SMALL_SHAPE if model == SMALL else shapes.SHAPES[model]
        shape = known | {"num_hidden_layers": layers}
        checkpoint.write(shapes.save(name, shape, root), 7, made)
        (made / "done").touch()
    return made


def verified(label: str, case: Case, model: Path, until: int) -> tuple[list, object, list[str]]:
    """The rows of verify's axes, its report, and what the report lacks. until: as of until.ending."""
    from until import ending

    from bi_patch.tools.bench import invariance
    from bi_patch.tools.verify import levels, local
    from bi_patch.tools.verify import measure as verify

    class Teller(verify.Watcher):
        def settled(self, axis, left):
            if axis.compared or axis.reason:
                said = f"{axis.differing} of {axis.compared} differ {axis.state} {axis.reason}"
                print(f"{label}: {axis.name}: {said}", flush=True)

    level = replace(levels.QUICK, seconds=None, cpu_seconds=None)
    level = replace(level, max_model_len=case.length or level.max_model_len)
    system = local.local(
        str(model),
        level,
        dtype="bfloat16",
        eager=case.eager,
        random_weights=None if case.model in LAYERS else SEED,
        engine_args=MEMORY | SIZES_OF_GRAPHS | schemes.arguments(case.model) | case.engine,
        environ=dict(os.environ) | case.environ,
    )
    with ending(until):
        report = verify.verify(system, level, only=case.axes, watcher=Teller())
    whole = invariance.complete(report) if report.stopped == verify.INTERRUPTED else report
    return invariance.rows(label, whole), report, invariance.unmeasured(report)


def of_data_ranks(label: str, case: Case, model: Path, scratch: Path, flags: Sequence[str]) -> list:
    """The rows of an engine of several data-parallel ranks, against one rank's engine or, with experts, against itself.

    flags: of data_ranks.py. Planted faults are printed only. Raises RuntimeError for a fault that no position shows.
    """
    from bi_patch.tools import evidence

    given = MEMORY | SIZES_OF_GRAPHS | {"model": str(model), "dtype": "bfloat16", "max_model_len": 1024, "seed": 0}
    given |= {
        "max_num_batched_tokens": 512,
        "max_num_seqs": 32,
        "enforce_eager": case.eager,
        "skip_tokenizer_init": True,
    }
    several = given | case.engine
    if case.model in EXPERTS:
        (found,) = data_ranks.engines(label, scratch, several, flags=flags)
        made = data_ranks.differing(found[data_ranks.ALONE], found, data_ranks.ALONE)
    else:
        one = {name: held for name, held in several.items() if name != "data_parallel_size"}
        plain, found = data_ranks.engines(label, scratch, one, several, flags=flags)
        made = data_ranks.differing(plain[data_ranks.ALONE], found)
    rows = [evidence.InvarianceRow(label, *counted) for counted in made]
    missed = []
    for fault, compared, count in data_ranks.caught(found):
        print(f"{label}: planted {fault or 'nothing'}: {count} of {compared} differ", flush=True)
        if bool(count) != bool(fault):
            missed.append(fault or "nothing")
    if missed:
        raise RuntimeError(f"{label}: planted {', '.join(missed)}: the answers do not show it")
    for row in rows:
        print(f"{label}: {row.axis}: {row.differing} of {row.compared} differ", flush=True)
    return rows


def _here() -> object:
    """The device and libraries of this process."""
    import torch
    import vllm

    return SimpleNamespace(
        device=torch.cuda.get_device_name(),
        vllm=vllm.__version__,
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
    )


def measure(
    label: str,
    results: Path,
    root: Path,
    flags: Sequence[str] = (),
    until: int = 0,
    without: Sequence[str] = (),
) -> bool:
    """Measure one case and write its rows. Returns whether every axis has a result and no position differs.

    flags: of data_ranks.py, for data-parallel ranks. With flags, nothing is written. until: a run of verify ends then,
    in seconds since 1970, and its complete axes are kept. without: axes that verify leaves out.
    """
    from bi_patch.tools import evidence

    class Ranks(evidence.Invariance, kw_only=True):
        variant = property(lambda self: "ranks")

    case, holes = CASES[label], []
    case = case._replace(axes=tuple(axis for axis in case.axes if axis not in without))
    model = folder(case.model, root)
    if "data_parallel_size" in case.engine:
        rows = of_data_ranks(label, case, model, root, flags)
        here = _here()
    elif "api_server_count" in case.engine:
        rows, holes = servers.measure(label, case.engine["api_server_count"], case.eager, MEMORY)
        here = _here()
    elif "distributed_executor_backend" in case.engine:
        rows, here = executors.measure(label, str(model), case.engine, MEMORY | SIZES_OF_GRAPHS, case.eager, root)
    else:
        rows, here, holes = verified(label, case, model, until)
    print(f"{label}: {'; '.join(holes) or 'complete'}", flush=True)
    if not rows or flags:
        return bool(flags) and not evidence.total_differing(rows)
    found = evidence.new(Ranks, here)
    found.rows, found.command = rows, "benchmarks/hopper/parallel.py"  # the cases share a file
    found.note = ". ".join(f"{label}: {hole.rstrip('.')}" for hole in holes)
    evidence.write(found, results)
    return not holes and not evidence.total_differing(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", nargs="*", default=list(CASES))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--models", type=Path, default=Path("/tmp/models"))
    parser.add_argument("--until", type=int, default=0, help="end axes of verify then, in seconds since 1970")
    parser.add_argument("--without", action="append", default=[], help="an axis of verify to leave out; repeatable")
    parser.add_argument("--prepare", action="store_true", help="only write the models of the cases")
    for flag, what in (("--stock", "without bi_patch"), ("--faults", "with planted faults, in eager mode")):
        parser.add_argument(flag, action="store_true", help=f"data-parallel ranks {what}; no rows are kept")
    args = parser.parse_args()
    flags = [f"--{name}" for name in ("stock", "faults") if getattr(args, name)]
    bi_patch_entry.without_arming()
    good = True
    for label in args.labels:
        start = time.perf_counter()
        if args.prepare:
            folder(CASES[label].model, args.models)
        else:
            good &= measure(label, args.results, args.models, flags, args.until, args.without)
        print(f"{label}: {time.perf_counter() - start:.0f} s", flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
