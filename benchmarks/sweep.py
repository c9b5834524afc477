"""What the sweeps over tiny models share: arguments, one engine after the other, and one result file of the day."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import bi_patch_entry

SEED = 7
# Two threads, because one hides variance.
ENVIRON = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
LEVELS = ("quick", "default", "full")


def arguments(doc: str, what: str, names: Sequence[str]) -> argparse.ArgumentParser:
    """A parser for a sweep. doc: the script's docstring. what: the name of the list of models, e.g. "families"."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(what, nargs="*", default=list(names))
    parser.add_argument("--level", choices=LEVELS, default="quick")
    parser.add_argument("--dtype", choices=list(_SHORT), default="bfloat16")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--axis", action="append", default=[], help="only this axis; may be repeated")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    return parser


def level(args: argparse.Namespace):
    """The Level of verify that was asked for, without a limit of time: every axis of the level is measured."""
    from bi_patch.tools.verify import levels

    return replace(levels.LEVELS[args.level], seconds=None, cpu_seconds=None)


def measure(name: str, system, args: argparse.Namespace, command: str, variant: str = "") -> int:
    """Measure one model and write its rows. Returns how many positions or numbers differ.

    system: what verify measures. command: of the sweep, without the list of models: they share a file. variant: as
    in `kind`.
    """
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import invariance

    more = "" if args.level == "quick" else f", --{args.level}"
    label = f"{name}, {_SHORT[args.dtype]}{' compiled' if args.compiled else ''}{more}"
    rows, report = invariance.measure(label, system, level(args), only=tuple(args.axis))
    took = sorted(((axis.seconds, axis.starting, axis.name) for axis in report.axes), reverse=True)
    print(f"{label}: {report.seconds:.0f} s; {report.starts} engine starts: {report.starting:.0f} s", flush=True)
    for seconds, starting, axis in took:
        if seconds + starting > 1:
            print(f"  {axis}: {seconds:.1f} s{f', start {starting:.1f} s' if starting else ''}", flush=True)
    found = evidence.new(kind(variant), report)
    found.rows = rows
    found.command = command
    evidence.write(found, args.results)
    return evidence.total_differing(rows)


def kind(variant: str):
    """evidence.Invariance for a file with this word in its name; "" for none."""
    from bi_patch.tools import evidence

    class Found(evidence.Invariance, kw_only=True):
        pass

    Found.variant = property(lambda self: variant)
    return Found


def run(names: Sequence[str], one: Callable[[str, str], int], *, errors: bool) -> None:
    """Measure all, and exit with 1 if something differs. one(name, folder): measures one. errors: errors count, too."""
    from bi_patch.tools.verify import forks

    differ = False
    with tempfile.TemporaryDirectory() as root, forks.forking(forks.MOST):
        # Each environment (eager, compiled, other threads) imports vLLM once for all models.
        for name in names:
            start = time.perf_counter()
            try:
                differing = one(name, root)
            except Exception as error:  # the sweep goes on: the next model has its own engine
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
                differ |= errors
                continue
            differ |= differing > 0
            print(f"{name}: {differing} differ ({time.perf_counter() - start:.0f} s)", flush=True)
    sys.exit(1 if differ else 0)


def case(label: str, system, level, axes: Sequence[str], variant: str, results: Path | None) -> list:
    """Measure one case, and write its rows at once, because the next case may fail. Returns the rows.

    system: what verify measures. variant: as in `kind`. results: the folder of the result file, None for no file.
    """
    from bi_patch.tools import evidence
    from bi_patch.tools.bench import invariance

    rows, report = invariance.measure(label, system, level, only=axes, tell=lambda text: print(text, flush=True))
    if results is not None:
        found = evidence.new(kind(variant), report)
        found.rows = rows
        print(evidence.write(found, results), flush=True)
    return rows


def cases(doc: str, measure: Callable[[str, Path | None], list]) -> None:
    """The main function of a script with cases. measure(only, results): the rows of the cases whose label contains
    `only`. Exits with 1 if something differs, or if no case has such a label."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure only cases with this text in their label")
    parser.add_argument("--results", type=Path, help="the folder of a result file; by default, none is written")
    given = parser.parse_args()
    bi_patch_entry.without_arming()
    from bi_patch.tools import evidence

    rows = measure(given.only, given.results)
    if not rows:
        raise SystemExit(f"no case has {given.only!r} in its label")
    sys.exit(1 if evidence.total_differing(rows) else 0)
