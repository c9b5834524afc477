"""Runs `bi-patch verify` for engines of several tensor-parallel or pipeline ranks on CPU, one thread each.

    PYTHONPATH=. python3 benchmarks/cpu/ranks.py [LABEL ...] [--results FOLDER]

Without labels, every case below is measured: one to three minutes each on two cores. A case with an axis measures this
axis alone: "tensor parallel size" compares the answers of 1, 2 and 4 ranks with BI_PATCH_TP_INVARIANT=8. The rows join
one result file of the day. Exit code 1: a position differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import bi_patch_entry

ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
EQUAL = {"BI_PATCH_TP_INVARIANT": "8"}
FEW = ("batch size", "position and order", "prefix cache", "chunk budget", "decode = prefill", "seeded sampling")
SIZES = ("tensor parallel size",)
MORE = (*FEW, "mixed lengths", "co-batch contents")


FOUR = {"num_hidden_layers": 4}  # a stage of a hybrid model needs layers of both kinds: vLLM stops otherwise
# Families with recurrent layers, and what four layers of them change in the family's shape.
RECURRENT = {
    "Qwen3-Next": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "Falcon-H1": {},
    "Granite 4-H": {"layer_types": ["mamba", "attention"] * 2},
    "Mamba": {},
    "Jamba": {},
    "LFM2": {"layer_types": ["conv", "full_attention"] * 2},
}
ONE_GROUP = "Granite 4-H, one group"  # the norm of a row is then one over ranks
SHAPES = {ONE_GROUP: ("Granite 4-H", {"mamba_n_groups": 1})}


def _mode(eager: bool) -> str:
    return "" if eager else " compiled"


class Case(NamedTuple):
    """model: a name of recipes.NAMES, of families.FAMILIES or of SHAPES. ranks: tensor-parallel ones. axes: of verify,
    empty for those of level quick. stages: of pipeline parallelism. shape: what differs from the family's shape."""

    model: str
    ranks: int
    axes: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    eager: bool = True
    environ: dict[str, str] = {}
    stages: int = 1
    shape: dict[str, object] = {}


CASES = {
    "tiny-qwen3 bf16 TP 2": Case("tiny-qwen3", 2),
    "tiny-qwen3 bf16 TP 2 compiled": Case("tiny-qwen3", 2, FEW, eager=False),
    "tiny-qwen3 fp32 TP 4": Case("tiny-qwen3", 4, FEW, "float32"),
    "tiny-qwen3-moe bf16 TP 2": Case("tiny-qwen3-moe", 2, FEW),
    "tiny-qwen3-moe bf16 TP 2 compiled": Case("tiny-qwen3-moe", 2, MORE, eager=False),
    **{
        f"{model} bf16 TP 4{_mode(eager)}": Case(model, 4, MORE, eager=eager)
        for model in ("tiny-qwen3", "tiny-qwen3-moe")
        for eager in (True, False)
    },
    **{
        f"tiny-qwen3 bf16 PP 3{_mode(eager)}": Case("tiny-qwen3", 1, MORE, eager=eager, stages=3)
        for eager in (True, False)
    },
    "tiny-qwen3 bf16, TP 1, 2 and 4 equal": Case("tiny-qwen3", 1, SIZES, environ=EQUAL),
    "tiny-qwen3 bf16, TP 1, 2 and 4 equal, compiled": Case("tiny-qwen3", 1, SIZES, eager=False, environ=EQUAL),
    "tiny-qwen3 fp32, TP 1, 2 and 4 equal": Case("tiny-qwen3", 1, SIZES, "float32", environ=EQUAL),
    "tiny-qwen3 bf16 TP 2, new weights": Case("tiny-qwen3", 2, ("weight update",)),
    "tiny-qwen3-moe bf16 TP 2, new weights": Case("tiny-qwen3-moe", 2, ("weight update",)),
    "tiny-qwen3 bf16 TP 2, new weights, compiled": Case("tiny-qwen3", 2, ("weight update",), eager=False),
    "tiny-llama bf16 TP 2, equal for every size": Case("tiny-llama", 2, FEW, environ=EQUAL),
    "DeepSeek V2 bf16 PP 2": Case("DeepSeek V2", 1, FEW, stages=2),
    "DeepSeek V2 bf16 PP 2 compiled": Case("DeepSeek V2", 1, FEW, eager=False, stages=2),
    **{
        f"{model} bf16 TP 2{' compiled' * (not eager)}": Case(model, 2, MORE, eager=eager)
        for model in ("tiny-qwen3-int8", "tiny-qwen2-awq", "tiny-llama-gptq", "tiny-qwen3-w4a16")
        for eager in (True, False)
    },
    **{
        f"{model} bf16 TP 2, new weights": Case(model, 2, ("weight update",))
        for model in ("tiny-qwen3-int8", "tiny-qwen2-awq")
    },
    "tiny-qwen3-int8 bf16 PP 2": Case("tiny-qwen3-int8", 1, FEW, stages=2),
    "tiny-qwen3-int8 bf16 PP 2 compiled": Case("tiny-qwen3-int8", 1, FEW, eager=False, stages=2),
    "tiny-qwen3 bf16 PP 2": Case("tiny-qwen3", 1, MORE, stages=2),
    **{
        f"tiny-qwen3-moe bf16 PP 2{_mode(eager)}": Case("tiny-qwen3-moe", 1, MORE, eager=eager, stages=2)
        for eager in (True, False)
    },
    "tiny-qwen3 bf16 PP 2, TP 1, 2 and 4 equal": Case("tiny-qwen3", 1, SIZES, environ=EQUAL, stages=2),
    **{
        f"{model} bf16 TP 2 PP 2{_mode(eager)}": Case(model, 2, MORE, eager=eager, stages=2)
        for model in ("tiny-qwen3", "tiny-qwen3-moe")
        for eager in (True, False)
    },
    **{
        f"{model} bf16 TP 2{_mode(eager)}": Case(model, 2, MORE, eager=eager)
        for model in ("DeepSeek V2", "DeepSeek V3", *RECURRENT, ONE_GROUP)
        for eager in (True, False)
    },
    **{
        f"{model}, four layers, bf16 PP 2{_mode(eager)}": Case(
            model, 1, MORE, eager=eager, stages=2, shape=FOUR | RECURRENT[model]
        )
        for model in RECURRENT
        if model != "Granite 4-H"  # vLLM's model runs the layers of all stages in each, and stops
        for eager in (True, False)
    },
}


def measure(label: str, results: Path) -> int:
    """Measure one case and write its rows. Returns the number of positions that differ."""
    from bi_patch import settings
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import invariance
    from bi_patch.tools.models import families, recipes, shapes
    from bi_patch.tools.verify import levels, local

    class Ranks(evidence.Invariance, kw_only=True):
        variant = property(lambda self: "ranks")

    case = CASES[label]
    level = replace(levels.LEVELS["quick"], seconds=None, cpu_seconds=None)
    given, folder = {"tensor_parallel_size": case.ranks}, settings.read().cache / "ranks"
    family, own = SHAPES.get(case.model, (case.model, case.shape))
    made = family in families.FAMILIES
    system = local.local(
        shapes.save(label, families.FAMILIES[family] | own, folder)
        if made
        else str(recipes.path(case.model, cache=settings.read().cache)),
        level,
        dtype=case.dtype,
        eager=case.eager,
        random_weights=7 if made else None,
        engine_args=given | ({"pipeline_parallel_size": case.stages} if case.stages > 1 else {}),
        environ=dict(os.environ) | ONE_THREAD | case.environ,
    )
    rows, report = invariance.measure(label, system, level, only=case.axes)
    found = evidence.new(Ranks, report)
    found.rows = rows
    found.command = "python3 benchmarks/cpu/ranks.py"  # the cases share a file
    evidence.write(found, results)
    return evidence.total_differing(rows)


def main() -> None:
    bi_patch_entry.without_arming()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", nargs="*", default=list(CASES))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    differ = 0
    for label in args.labels:
        start = time.perf_counter()
        found = measure(label, args.results)
        differ += found
        print(f"{label}: {found} positions differ, {time.perf_counter() - start:.0f} s", flush=True)
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
