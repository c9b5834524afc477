"""Checks one vLLM release against its patches: they apply, reverse and close seams; no anchor moved."""

import ast
import tempfile
from collections import Counter
from pathlib import Path

import msgspec
from packaging.version import Version

from bi_patch import files
from bi_patch.errors import AnchorMoved, PatchError
from bi_patch.platforms.releases import PACKAGES
from bi_patch.seams import anchors
from bi_patch.seams.anchors import Anchor
from bi_patch.seams.plan import Planned
from bi_patch.tools.upstream import apply, places, series
from bi_patch.tools.upstream.places import Problem
from bi_patch.tools.upstream.series import Committed, Patch
from bi_patch.tools.upstream.sources import Source

HOLDERS = "copies.json"
_CALL = [ast.dump(statement) for statement in ast.parse(series.CALL).body]


class Report(msgspec.Struct):
    """What was found in one source. base: the release whose series was tried, if `release` is unknown."""

    source: str
    release: str
    base: str
    patches: int = 0
    applied: int = 0
    reversed: int = 0
    seams: int = 0
    closed: int = 0
    anchors: int = 0
    matched: int = 0
    problems: list[Problem] = []
    package: str = "vllm"

    @property
    def ok(self) -> bool:
        return not self.problems


def check(source: Source) -> Report:
    """Check a source against the committed series of its release.

    A release without a series is a problem by itself; it is then checked against the nearest known release,
    so that a maintainer sees what has to be ported.
    """
    distribution, releases = PACKAGES[source.package]
    base = nearest(source.release, source.package)
    planned = series.planned_seams(base, source.package)
    report = against(source, base, planned, anchors.folder_of(base, source.package))
    if base != source.release:
        name = "vLLM" if distribution == "vllm" else distribution
        message = (
            f"{name} {source.release} is unknown: there are series for {', '.join(releases)}. "
            f"What follows compares it with {base}"
        )
        report.problems.insert(0, Problem("release", message))
    return report


def against(source: Source, base: str, planned: tuple[Planned, ...], folder: Path) -> Report:
    """Check a source against these seams and the series and anchors in `folder`."""
    report = Report(
        source.label,
        source.release,
        base,
        seams=len(planned),
        anchors=len(planned),
        problems=[],
        package=source.package,
    )
    held = places.holders(planned, source)
    _check_series(report, source, planned, series.make(planned, held), folder)
    _check_anchors(report, source, planned, folder)
    recorded = files.read_json(folder / HOLDERS, dict[str, list[str]]) or {}
    report.problems += places.check_holders(planned, source, held, recorded)
    return report


def nearest(release: str, package: str = "vllm") -> str:
    """`release` where it is known, else the newest known one before it, else the oldest."""
    known = sorted(PACKAGES[package][1], key=Version)
    return next((r for r in reversed(known) if Version(r) <= Version(release)), known[0])


def _check_series(
    report: Report, source: Source, planned: tuple[Planned, ...], wanted: tuple[Patch, ...], folder: Path
) -> None:
    try:
        committed = series.read(folder)
    except PatchError as error:
        report.problems.append(Problem("series", str(error)))
        return
    report.patches = len(committed)
    report.problems += [Problem("series", text) for text in series.stale(wanted, committed)]
    with tempfile.TemporaryDirectory(prefix="bi_patch-") as name:
        tree = Path(name)
        _lay_out(tree, source, {c.target for c in committed})
        before = _contents(tree)
        applied = _try_each(report, tree, committed, reverse=False)
        report.applied = len(applied)
        by_file = {path: p for p in wanted if (path := anchors.path_of(p.module, source.files.__contains__))}
        _check_contents(report, tree, before, applied, by_file)
        report.closed = _count_closed(report, tree, applied, planned, by_file)
        # One that failed leaves its own file alone, so that the others can still be taken back.
        report.reversed = len(_try_each(report, tree, tuple(reversed(applied)), reverse=True))
        left = sorted(file for file, content in _contents(tree).items() if content != before.get(file))
        if report.reversed == report.applied and left:
            report.problems.append(Problem("patch", f"reversing the series leaves {', '.join(left)} changed"))


def _lay_out(tree: Path, source: Source, targets: set[str]) -> None:
    for file in targets & source.files:
        path = tree / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read(file))


def _contents(tree: Path) -> dict[str, bytes]:
    return {p.relative_to(tree).as_posix(): p.read_bytes() for p in tree.rglob("*") if p.is_file()}


def _try_each(report: Report, tree: Path, committed: tuple[Committed, ...], *, reverse: bool) -> tuple[Committed, ...]:
    """Apply or reverse each patch; those that fail are reported, the others returned."""
    done = []
    for patch in committed:
        try:
            if not reverse and series.CALL in _read(tree / patch.target):
                raise PatchError(
                    f"{patch.name}: {patch.target} carries bi_patch's call already: check the unpatched release"
                )
            apply.apply(tree, patch.path, reverse=reverse)
            done.append(patch)
        except PatchError as error:
            report.problems.append(Problem("patch", str(error), file=patch.target))
    return tuple(done)


def _check_contents(
    report: Report,
    tree: Path,
    before: dict[str, bytes],
    applied: tuple[Committed, ...],
    by_file: dict[str, Patch],
) -> None:
    """Each patched file is what it was plus the call, and no other file changed."""
    expected = dict(before)
    for patch in applied:
        if patch.target in by_file:
            expected[patch.target] = by_file[patch.target].patched(before[patch.target].decode()).encode()
    after = _contents(tree)
    for file in sorted({*expected, *after}):
        if after.get(file) != expected.get(file):
            report.problems.append(Problem("patch", f"{file} is changed by more than the call at its end", file=file))


def _count_closed(
    report: Report,
    tree: Path,
    applied: tuple[Committed, ...],
    planned: tuple[Planned, ...],
    by_file: dict[str, Patch],
) -> int:
    """How many seams one applied diff claims and closes; each claim that fails is reported."""
    claims = Counter(seam for patch in applied for seam in patch.closes)
    claimed_in = {seam: patch for patch in applied for seam in patch.closes}
    known = {p.seam.name for p in planned}
    for seam in sorted(set(claims) - known):
        message = f"{claimed_in[seam].name} claims {seam}, which is no seam of {report.base}"
        report.problems.append(Problem("close", message, seam))
    closed = 0
    for item in planned:
        seam, target = item.seam.name, item.target
        patch = claimed_in.get(seam)
        told = None
        if patch is None:
            told = f"no diff that applies closes {seam}"
        elif claims[seam] > 1:
            told = f"{claims[seam]} diffs claim {seam}"
        elif patch.target not in by_file or by_file[patch.target].module != target.module:
            told = f"{patch.name} claims {seam}, whose target is in {target.module}"
        else:
            told = _look(tree, patch, item)
        if told is None:
            closed += 1
        else:
            report.problems.append(Problem("close", told, seam, str(target), patch.target if patch else ""))
    for patch in applied:  # modules that only hold copies
        if not patch.closes and not _calls(_read(tree / patch.target)):
            message = f"{patch.name} does not end {patch.target} with the call"
            report.problems.append(Problem("close", message, file=patch.target))
    return closed


def _look(tree: Path, patch: Committed, item: Planned) -> str | None:
    """Why the patched module does not close a seam, or None."""
    text = _read(tree / patch.target)
    try:
        anchors.take(item, patch.target, text)
        if _calls(text):
            return None
    except AnchorMoved as error:
        return str(error)
    except SyntaxError as error:
        return f"{patch.target} cannot be read as Python: {error}"
    return f"{patch.name} claims {item.seam.name} but {patch.target} does not end with the call that closes it"


def _calls(text: str) -> bool:
    """Whether a module ends with the statements that close its seams."""
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return False
    return [ast.dump(statement) for statement in body[-len(_CALL) :]] == _CALL


def _read(path: Path) -> str:
    return path.read_bytes().decode(errors="replace") if path.is_file() else ""


def _check_anchors(report: Report, source: Source, planned: tuple[Planned, ...], folder: Path) -> None:
    recorded = {a.seam: a for a in files.read_json(folder / "anchors.json", list[Anchor]) or ()}
    for item in planned:
        problem = places.check_anchor(item, source, recorded.get(item.seam.name))
        if problem is None:
            report.matched += 1
        else:
            report.problems.append(problem)
    for seam in sorted(set(recorded) - {p.seam.name for p in planned}):
        report.problems.append(Problem("anchor", f"an anchor is recorded for {seam}, which is no seam here", seam))
