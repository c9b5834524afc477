"""The Report of `bi-patch verify`, also as a JSON file: axes, counts, where bits differ, and the exit code."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path
from typing import ClassVar

import msgspec

from bi_patch.files import write_json
from bi_patch.tools.provenance import Provenance
from bi_patch.tools.verify.answers import Difference
from bi_patch.tools.verify.case import Case
from bi_patch.tools.verify.precision import Precision

FORMAT = 1  # the JSON file's format number: raise it when a field goes or changes its meaning, not for a new field
INVARIANT, DIFFERS, UNCHECKED = 0, 1, 2  # exit codes
SENT_AGAIN = "requests sent again"  # in Report.served, where a connection broke before an answer began

# States of an axis. PASSED: all compared positions are bitwise the same. NOT_APPLICABLE: the axis cannot occur here, or
# the engine refuses the feature by name. LEFT_OUT: the level does not hold the axis. OUT_OF_TIME: the level holds the
# axis, but the time limit came first. NOT_EXERCISED: the probe ran, but its cause never occurred. FAILED: the engine or
# server failed, or its answers cannot be compared.
PASSED, DIFFERED, NOT_APPLICABLE, LEFT_OUT, OUT_OF_TIME, NOT_EXERCISED, FAILED, WAITING = (
    "invariant",
    "differs",
    "not applicable",
    "left out",
    "out of time",
    "not exercised",
    "failed",
    "not run",
)
UNSETTLED = (OUT_OF_TIME, NOT_EXERCISED, FAILED, WAITING)
_SEVERITY = {DIFFERED: 4, FAILED: 3, NOT_EXERCISED: 2, OUT_OF_TIME: 1}  # 0 for the others


class Pair(msgspec.Struct):
    """A summary of a pair that differed. located: the first operation that differs, "" when no search was made."""

    label: str
    first: str
    compared: int
    differing: int
    company: int
    located: str = ""


class Axis(msgspec.Struct):
    """One axis: its state, the reason for the state, and what was compared.

    compared, differing: positions (generated and prompt). undefined: positions that are NaN on both sides. pairs:
    compared pairs of answers. digests: rows of logits compared over the full vocabulary. undigested: pairs that should
    have such rows and have none. largest: greatest |difference| of a logprob. ulps: the same in steps of float32.
    generated, prompt: (position, how often the position differed), ascending. shown: the first pairs that differ. case:
    the complete differing pair with the fewest requests in company, so that it can be run again. seconds: of asking and
    comparing. starting: seconds of starting the axis's own engines; axes that share an engine share its time.
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
    undefined: int = 0
    undigested: int = 0
    largest: float = 0.0
    ulps: int = 0
    seconds: float = 0.0
    starting: float = 0.0
    generated: list[tuple[int, int]] = []
    prompt: list[tuple[int, int]] = []
    shown: list[Pair] = []
    case: Case | None = None

    def add(self, case: Case) -> None:
        """Count one compared pair."""
        self.undigested += case.digested and not case.difference.digests
        beside = len(case.company.requests) - 1
        self.count(case.label, case.difference, beside)
        if case.differs and (self.case is None or beside < len(self.case.company.requests) - 1):
            self.case = case

    def count(self, label: str, d: Difference, beside: int = 0) -> None:
        """Count the difference of one pair. beside: the number of requests in company."""
        self.pairs += 1
        self.compared += d.compared
        self.differing += d.differing
        self.tokens_changed += d.tokens_changed
        self.digests += d.digests
        self.undefined += d.undefined
        self.largest = max(self.largest, d.largest if math.isfinite(d.largest) else sys.float_info.max)
        self.ulps = max(self.ulps, d.ulps)
        if not d.differing:
            return
        self.generated = _counted(self.generated, d.generated)
        self.prompt = _counted(self.prompt, d.prompt)
        if len(self.shown) < _SHOWN:
            self.shown.append(Pair(label, d.first, d.compared, d.differing, beside))

    def settle(self, state: str = "", reason: str = "") -> None:
        """Set the axis's state. An axis with several engines is settled after each; the most severe state stays."""
        state, reason = self._judge(state, reason)
        if _SEVERITY.get(self.state, 0) > _SEVERITY.get(state, 0):
            return
        self.reason = self.reason or reason if state == self.state else reason
        self.state = state

    def _judge(self, state: str, reason: str) -> tuple[str, str]:
        if self.differing:
            return DIFFERED, reason
        if state not in (FAILED, NOT_EXERCISED):
            if self.undefined:
                return FAILED, (
                    f"{self.undefined:,} positions have a NaN logprob in both answers, which proves nothing: the "
                    "model's logits are NaN there, or the engine returned logprobs of other tokens"
                )
            if self.undigested:
                return FAILED, f"{self.undigested:,} pairs have no digests of their rows of logits, although requested"
            if self.compared and NOT_APPLICABLE in (state, self.state):
                return FAILED, f"only a part of the axis could be measured: {reason or self.reason}"
        if not state:
            state = PASSED if self.compared else NOT_EXERCISED
        return state, reason or ("nothing was compared" if state == NOT_EXERCISED else "")


class Report(msgspec.Struct, tag_field="format", tag=FORMAT):
    """A run of verify. docs/verify.md describes every field of the JSON file; the first field is `format`.

    system: the model or the server's address. mode: "armed", "upstream", "stock", or "server", whose arming `served`
    states. level: the level's name. complete: every axis that the level holds was measured or does not apply.
    stopped: what ended the run early, "" for a complete run. failure: the traceback of an unexpected error. options:
    the base engine's options, None for a server. served: what a server says about itself. starts: engines started, 0
    for a server. starting: seconds of all these starts. locating: seconds of the search for the first operation that
    differs, with its engines. precision: the accuracy of the model's linears against fp64, None when the run did not
    measure it. provenance: which bi_patch measured, and with which command.
    """

    title: ClassVar[str] = "Is it batch-invariant?"  # of the page
    note: ClassVar[str] = (
        "On each axis, the engine answers the same requests in two scenarios. Tokens, chosen logprobs and top logprobs "
        "are compared bit by bit"
    )

    system: str
    mode: str
    level: str
    date: str
    axes: list[Axis]
    vllm: str = ""
    torch: str = ""
    device: str = ""
    threads: int = 0
    options: dict[str, object] | None = None
    served: dict[str, object] | None = None
    open_seams: tuple[str, ...] = ()
    logits: bool = False
    precision: Precision | None = None
    seconds: float = 0.0
    starts: int = 0
    starting: float = 0.0
    locating: float = 0.0
    complete: bool = False
    stopped: str = ""
    failure: str = ""
    verdict: list[str] = []
    exit_code: int = UNCHECKED
    provenance: Provenance | None = None

    @property
    def compared(self) -> int:
        return sum(axis.compared for axis in self.axes)

    @property
    def differing(self) -> int:
        return sum(axis.differing for axis in self.axes)

    def conclude(self) -> None:
        """Fill in the verdict and the exit code from the axes."""
        unchecked = self.precision is not None and self.precision.unchecked
        self.complete = not self.stopped and not unchecked and all(axis.state not in UNSETTLED for axis in self.axes)
        self.exit_code = exit_code(self)
        self.verdict = sentences(self)


_SHOWN = 8


def exit_code(report: Report) -> int:
    """0: invariant and accurate. 1: a position differs, or products are inaccurate. 2: something was not checked."""
    if report.differing or (report.precision is not None and report.precision.failed):
        return DIFFERS
    return INVARIANT if report.complete and report.compared and not report.open_seams else UNCHECKED


def sentences(report: Report) -> list[str]:
    """The sentences of the verdict. The verdict of a run that ended early begins with "Incomplete:"."""
    what = {"server": "the server", "armed": "the armed engine", "stock": "the stock engine"}.get(
        report.mode, "vLLM's own batch-invariant mode"
    )
    what = (
        f"Incomplete: {what}" if report.stopped else what[0].upper() + what[1:] if report.mode != "upstream" else what
    )
    settled = [axis for axis in report.axes if axis.compared]
    digests = sum(axis.digests for axis in report.axes)
    rows = f" ({digests:,} of them with whole rows of logits)" if digests else ""
    said = []
    if report.differing:
        wrong = [axis.name for axis in report.axes if axis.differing]
        said.append(
            f"{what} is NOT batch-invariant: {report.differing:,} of {report.compared:,} positions differ. "
            f"Axes that differ: {', '.join(wrong)}."
        )
    elif report.compared:
        said.append(
            f"{what} was bitwise invariant in all {report.compared:,} compared positions{rows}, along "
            f"{len(settled)} {'axis' if len(settled) == 1 else 'axes'}."
        )
    else:
        said.append(f"{what} could not be checked: nothing was compared.")
    if report.served is not None:
        said.append(_sign(report.served.get("bi_patch")))
        if again := report.served.get(SENT_AGAIN):
            said.append(
                f"Connections broke before an answer began: {again} requests were sent again, so their company and "
                "cache may not be those of the axis."
            )
    if report.precision is not None:
        said.append(report.precision.words())
    if report.stopped:
        kept = " The report keeps all comparisons made before." if report.compared else ""
        said.append(f"Stopped early: {report.stopped.rstrip('.')}.{kept}")
    late = [axis for axis in report.axes if axis.state == OUT_OF_TIME]
    if late:
        said.append(f"Not measured for lack of time: {', '.join(axis.name for axis in late)} ({late[0].reason}).")
    undone = [axis for axis in report.axes if axis.state in UNSETTLED and axis not in late]
    if undone and not report.stopped:
        named = "; ".join(f"{axis.name} ({axis.state}: {axis.reason})" for axis in undone)
        said.append(f"Could not be checked: {named}.")
    if report.open_seams:
        said.append(f"Required patch points are open, so invariance is not guaranteed: {', '.join(report.open_seams)}.")
    return said


def _sign(said: object) -> str:
    """A sentence on what a server's /version says of bi_patch."""
    if not isinstance(said, dict):
        return "The server is not armed: its /version gives no sign of bi_patch. It runs upstream's mode or stock vLLM."
    return f"The server says that it is armed: bi_patch {said.get('version')}, digest {str(said.get('digest'))[:12]}."


def write(report: Report, path: Path) -> None:
    """Write the JSON file. `read` gives the same report, bit for bit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, as_json(report))
    path.chmod(0o644)


def read(path: Path) -> Report:
    """Read a report's JSON file. Raises msgspec.DecodeError for a file that is no report of this format."""
    return from_json(msgspec.json.decode(path.read_bytes()))


def as_json(report: Report) -> object:
    """The report as the JSON file holds it."""
    return _finite(msgspec.to_builtins(report))


def from_json(value: object) -> Report:
    """The report that `as_json` turned into this value. Raises msgspec.ValidationError for any other value."""
    return msgspec.convert(value, Report, strict=False)  # strict=False turns "nan" into a float


def _finite(value: object) -> object:
    """The value with "nan", "inf" and "-inf" in place of the floats that JSON cannot express."""
    if isinstance(value, dict):
        return {key: _finite(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(held) for held in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _counted(before: list[tuple[int, int]], positions: tuple[int, ...]) -> list[tuple[int, int]]:
    total = Counter(dict(before))
    total.update(positions)
    return sorted(total.items())
