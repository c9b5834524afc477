"""What `bi-patch verify` found: axes, counts, where bits differ, and the exit code. The JSON file is this Report."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path

import msgspec

from bi_patch.files import write_json
from bi_patch.verify.case import Case
from bi_patch.verify.precision import Precision

INVARIANT, DIFFERS, UNCHECKED = 0, 1, 2  # exit codes

# States of an axis. PASSED: compared and bitwise the same. NOT_APPLICABLE: cannot occur here, or is refused by name.
# LEFT_OUT: by the level. NOT_EXERCISED: ran, but its cause never occurred. FAILED: the engine or server failed.
PASSED, DIFFERED, NOT_APPLICABLE, LEFT_OUT, NOT_EXERCISED, FAILED, WAITING = (
    "invariant", "differs", "not applicable", "left out", "not exercised", "failed", "not run",
)  # fmt: skip
UNSETTLED = (NOT_EXERCISED, FAILED, WAITING)


class Pair(msgspec.Struct):
    """A pair that differed, in short. located: words for the first operation that differs, "" when not looked for."""

    label: str
    first: str
    compared: int
    differing: int
    company: int
    located: str = ""


class Axis(msgspec.Struct):
    """One axis: its state and why, and what was compared.

    compared, differing: positions (generated and prompt). pairs: compared pairs of answers; digests: rows of logits
    compared over the full vocabulary. largest: greatest |difference| of a logprob; ulps: the same in steps of float32.
    generated, prompt: (position, how often it differed), ascending. shown: the first pairs that differ. case: the one
    of them with the smallest company, whole, to run again.
    """

    name: str
    about: str
    causes: tuple[int, ...] = ()
    state: str = WAITING
    reason: str = ""
    compared: int = 0
    differing: int = 0
    tokens_changed: int = 0
    pairs: int = 0
    digests: int = 0
    largest: float = 0.0
    ulps: int = 0
    seconds: float = 0.0
    generated: list[tuple[int, int]] = []
    prompt: list[tuple[int, int]] = []
    shown: list[Pair] = []
    case: Case | None = None

    def add(self, case: Case) -> None:
        """Count one compared pair."""
        d = case.difference
        self.pairs += 1
        self.compared += d.compared
        self.differing += d.differing
        self.tokens_changed += d.tokens_changed
        self.digests += d.digests
        self.largest = max(self.largest, d.largest if math.isfinite(d.largest) else sys.float_info.max)
        self.ulps = max(self.ulps, d.ulps)
        if not d.differing:
            return
        self.generated = _counted(self.generated, d.generated)
        self.prompt = _counted(self.prompt, d.prompt)
        if len(self.shown) < _SHOWN:
            self.shown.append(Pair(case.label, d.first, d.compared, d.differing, len(case.company.requests) - 1))
        if self.case is None or len(case.company.requests) < len(self.case.company.requests):
            self.case = case

    def settle(self, state: str = "", reason: str = "") -> None:
        """Close the axis. A difference found wins over whatever ended it."""
        self.reason = reason
        self.state = DIFFERED if self.differing else state or (PASSED if self.compared else NOT_EXERCISED)
        if self.state == NOT_EXERCISED and not reason:
            self.reason = "nothing was compared"


class Report(msgspec.Struct):
    """A run of verify. complete: every axis that the level holds was settled; stopped: what ended it early.

    mode: "armed", "upstream", "stock", or "server" where the arming cannot be seen. level: quick, default or full.
    precision: of the model's linears against fp64, None where it was not measured.
    """

    target: str
    mode: str
    level: str
    date: str
    axes: list[Axis]
    vllm: str = ""
    torch: str = ""
    device: str = ""
    threads: int = 0
    options: dict[str, object] = {}
    open_seams: tuple[str, ...] = ()
    logits: bool = False
    precision: Precision | None = None
    seconds: float = 0.0
    starts: int = 0
    complete: bool = False
    stopped: str = ""
    verdict: list[str] = []
    exit_code: int = UNCHECKED

    @property
    def compared(self) -> int:
        return sum(axis.compared for axis in self.axes)

    @property
    def differing(self) -> int:
        return sum(axis.differing for axis in self.axes)

    def conclude(self) -> None:
        """Fill in the verdict and the exit code from the axes."""
        self.complete = not self.stopped and all(axis.state not in UNSETTLED for axis in self.axes)
        self.exit_code = exit_code(self)
        self.verdict = sentences(self)


_SHOWN = 8


def exit_code(report: Report) -> int:
    """0: invariant, accurate. 1: a position differed, or products are inaccurate. 2: something could not be checked."""
    if report.differing or (report.precision is not None and report.precision.failed):
        return DIFFERS
    return INVARIANT if report.complete and report.compared and not report.open_seams else UNCHECKED


def sentences(report: Report) -> list[str]:
    """The verdict in plain words."""
    what = {"server": "The server", "armed": "The armed engine", "stock": "The stock engine"}.get(
        report.mode, "vLLM's own batch-invariant mode")
    settled = [axis for axis in report.axes if axis.compared]
    digests = sum(axis.digests for axis in report.axes)
    rows = f", {digests:,} of them by their whole row of logits" if digests else ""
    said = []
    if report.differing:
        wrong = [axis.name for axis in report.axes if axis.differing]
        said.append(
            f"{what} is NOT batch-invariant: {report.differing:,} of {report.compared:,} positions differ, along "
            f"{', '.join(wrong)}."
        )
    elif report.compared:
        said.append(
            f"{what} was bitwise invariant in all {report.compared:,} positions compared{rows}, along "
            f"{len(settled)} axes."
        )
    else:
        said.append(f"{what} could not be checked: nothing was compared.")
    if report.precision is not None:
        said.append(report.precision.words())
    if report.stopped:
        said.append(f"Stopped early: {report.stopped.rstrip('.')}. What was compared until then is kept.")
    undone = [f"{axis.name} ({axis.state}: {axis.reason})" for axis in report.axes if axis.state in UNSETTLED]
    if undone and not report.stopped:
        said.append(f"Could not be checked: {'; '.join(undone)}.")
    if report.open_seams:
        said.append(f"Required seams are open: {', '.join(report.open_seams)}: invariance cannot be promised.")
    return said


def write(report: Report, path: Path) -> None:
    """The JSON file; readable by `read`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)
    path.chmod(0o644)


def read(path: Path) -> Report:
    return msgspec.json.decode(path.read_bytes(), type=Report)


def _counted(before: list[tuple[int, int]], positions: tuple[int, ...]) -> list[tuple[int, int]]:
    total = Counter(dict(before))
    total.update(positions)
    return sorted(total.items())
