"""The report of `bi-patch parity`: verify's report with other sentences and the runs of GRPO."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import msgspec

from bi_patch.tools.parity.plan import Plan, Run
from bi_patch.tools.verify import report as verify
from bi_patch.tools.verify.report import Report


class ParityReport(Report, tag_field="format", tag=verify.FORMAT):
    """A run of parity. Each axis is a line: trainer against sampler, except `gradients` and `GRPO rerun`.

    plan: the sizes of the run. runs: the runs of GRPO.
    """

    title: ClassVar[str] = "Do trainer and sampler agree?"
    note: ClassVar[str] = (
        "Each line compares numbers bit by bit: the logprobs of sampler and trainer, the gradients of other "
        "micro-batches, or two runs of GRPO"
    )

    plan: Plan = msgspec.field(default_factory=Plan)
    runs: list[Run] = []

    def conclude(self) -> None:
        self.complete = not self.stopped and all(axis.state not in verify.UNSETTLED for axis in self.axes)
        self.exit_code = verify.exit_code(self)
        self.verdict = _sentences(self)


def _sentences(report: ParityReport) -> list[str]:
    what = f"{'Incomplete: the' if report.stopped else 'The'} {report.mode} trainer and its sampler"
    lines = [axis.name for axis in report.axes if axis.compared]
    said = []
    if report.differing:
        wrong = [axis.name for axis in report.axes if axis.differing]
        said.append(
            f"{what} do NOT agree: {report.differing:,} of {report.compared:,} compared values differ. Lines that "
            f"differ: {', '.join(wrong)}."
        )
    elif report.compared:
        said.append(f"{what} agree bitwise in all {report.compared:,} compared values, along {len(lines)} lines.")
    else:
        said.append(f"{what} could not be compared.")
    said += [_run(run) for run in report.runs]
    if report.stopped:
        said.append(f"Stopped early: {report.stopped.rstrip('.')}.")
    undone = [axis for axis in report.axes if axis.state in verify.UNSETTLED]
    if undone and not report.stopped:
        said.append(f"Could not be checked: {'; '.join(f'{a.name} ({a.state}: {a.reason})' for a in undone)}.")
    if report.open_seams:
        said.append(f"Required patch points are open, so nothing is guaranteed: {', '.join(report.open_seams)}.")
    return said


def _run(run: Run) -> str:
    kl = max((abs(step.kl) for step in run.steps), default=0.0)
    rewards = ", ".join(f"{step.reward:.4f}" for step in run.steps)
    words = "exactly 0 in each step" if kl == 0 else f"up to {kl:.2g}"
    return (
        f"GRPO with micro-batches of {run.micro} and up to {run.seats} requests together: {len(run.steps)} steps, KL "
        f"{words}, rewards {rewards}, master weights {run.masters[:16]}."
    )


def read(path: Path) -> ParityReport:
    """Read a report's JSON file. Raises msgspec.DecodeError or ValidationError for another file."""
    return msgspec.convert(msgspec.json.decode(path.read_bytes()), ParityReport, strict=False)


def steps(report: ParityReport) -> list[str]:
    """The tables of the GRPO runs in HTML."""
    parts = []
    for run in report.runs:
        head = "".join(f"<th class='n'>{name}</th>" for name in ("step", "reward", "gradient norm", "k3 KL", "differ"))
        rows = "".join(
            f"<tr><td class='n'>{at}</td><td class='n'>{s.reward:.4f}</td><td class='n'>{s.norm:.6f}</td>"
            f"<td class='n'>{s.kl:.3g}</td><td class='n'>{s.differing:,} of {s.compared:,}</td></tr>"
            for at, s in enumerate(run.steps)
        )
        parts.append(
            f"<h2>GRPO, micro-batches of {run.micro}, up to {run.seats} requests together</h2>"
            f"<table><tr>{head}</tr>{rows}</table><p class='note'>Master weights: SHA-256 {run.masters}</p>"
        )
    return parts
