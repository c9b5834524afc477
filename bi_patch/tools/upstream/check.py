"""Checks patches against one vLLM release: the patches apply, reverse and close their seams, and no anchor moved."""

import ast
import tempfile
from pathlib import Path

from packaging.version import Version

from bi_patch.errors import AnchorMoved, PatchError
from bi_patch.platforms.releases import PACKAGES
from bi_patch.seams import anchors
from bi_patch.seams.anchors import Recorded
from bi_patch.seams.plan import Planned, anchored
from bi_patch.tools.upstream import apply, moved, series
from bi_patch.tools.upstream.places import Module, Places, locate
from bi_patch.tools.upstream.report import Problem, Report
from bi_patch.tools.upstream.series import Committed
from bi_patch.tools.upstream.sources import Source

_CALL = [ast.dump(statement) for statement in ast.parse(series.CALL).body]


def check(source: Source) -> Report:
    """Check a source against the committed series of its release.

    A release without a series is a problem of its own. Such a release is checked against the nearest known release, so
    that a maintainer sees what must be ported.
    """
    base = nearest(source.release, source.package)
    planned = series.planned_seams(base, source.package)
    report = against(source, base, planned, anchors.folder_of(base, source.package))
    if base != source.release:
        message = (
            f"{source.name} {source.release} is unknown: the known releases are "
            f"{', '.join(PACKAGES[source.package][1])}. What follows compares it with {base}"
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
        anchors=len(anchored(planned)),
        problems=[],
        package=source.package,
    )
    places = locate(source, planned)
    recorded = anchors.read(folder)
    _check_series(report, places, folder)
    _check_anchors(report, places, recorded)
    report.problems += moved.check_copies(places, recorded.copies)
    return report


def nearest(release: str, package: str = "vllm") -> str:
    """`release` if it is known, else the newest known release before it, else the oldest known release."""
    known = sorted(PACKAGES[package][1], key=Version)
    return next((r for r in reversed(known) if Version(r) <= Version(release)), known[0])


def _check_series(report: Report, places: Places, folder: Path) -> None:
    try:
        committed = series.read(folder)
    except PatchError as error:
        report.problems.append(Problem("series", str(error)))
        return
    wanted = series.make(places.planned, places.copies)
    report.patches = len(committed)
    report.problems += [Problem("series", text) for text in series.stale(wanted, committed)]
    with tempfile.TemporaryDirectory(prefix="bi_patch-") as name:
        tree = Path(name)
        _lay_out(tree, places.source, {c.target for c in committed})
        before = _contents(tree)
        applied = _try_each(report, tree, committed, reverse=False)
        report.applied = len(applied)
        modules = [places.modules[p.module] for p in wanted if p.module in places.modules]
        _check_contents(report, tree, before, [m for m in modules if m.file in {c.target for c in applied}])
        report.closed = _count_closed(report, tree, applied, places)
        _check_calls(report, tree, applied, {m.file for m in modules})
        # A patch that failed changed no file, so the others can still be reversed.
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
    """Apply or reverse each patch. Returns the patches that succeed, and reports the others."""
    done = []
    for patch in committed:
        try:
            if not reverse and series.CALL in _read(tree / patch.target):
                raise PatchError(f"{patch.name}: {patch.target} is patched already: check the unpatched release")
            apply.apply(tree, patch.path, reverse=reverse)
            done.append(patch)
        except PatchError as error:
            report.problems.append(Problem("patch", str(error), file=patch.target))
    return tuple(done)


def _check_contents(report: Report, tree: Path, before: dict[str, bytes], changed: list[Module]) -> None:
    """Report each file that changed otherwise: `changed` modules gain the call, and no other file changes."""
    expected = before | {m.file: series.patched(m.text).encode(errors="surrogateescape") for m in changed}
    after = _contents(tree)
    for file in sorted({*expected, *after}):
        if after.get(file) != expected.get(file):
            report.problems.append(Problem("patch", f"the patch changes {file} by more than the final call", file=file))


def _count_closed(report: Report, tree: Path, applied: tuple[Committed, ...], places: Places) -> int:
    """The number of seams that exactly one applied diff closes. Reports every other seam."""
    closed = 0
    for item in places.planned:
        module = places.modules.get(item.target.module)
        told = _why_open(tree, [p for p in applied if module and p.target == module.file], item, module)
        if told is None:
            closed += 1
        else:
            file = module.file if module else ""
            report.problems.append(Problem("close", told, item.seam.name, str(item.target), file))
    return closed


def _why_open(tree: Path, patches: list[Committed], item: Planned, module: Module | None) -> str | None:
    """Why these diffs of a seam's module do not close the seam; None if they close it."""
    if not patches or module is None:
        return f"no diff that applies closes {item.seam.name}"
    if len(patches) > 1:
        return f"{len(patches)} diffs change {module.file}: {', '.join(p.name for p in patches)}"
    text = _read(tree / module.file)
    try:
        moved.take(item, Module(module.file, text))
    except AnchorMoved as error:
        return str(error)
    if not _calls(text):
        return f"{patches[0].name} does not end {module.file} with the call that closes {item.seam.name}"
    return None


def _check_calls(report: Report, tree: Path, applied: tuple[Committed, ...], to_change: set[str]) -> None:
    """Report each applied diff that does not end its module with the call, or whose module holds no target or copy."""
    told_of = {p.file for p in report.problems if p.kind == "close"}
    for patch in applied:
        told = None
        if patch.target not in to_change:
            told = f"{patch.name} changes {patch.target}, which holds no seam's target and no copy of a target"
        elif patch.target not in told_of and not _calls(_read(tree / patch.target)):
            told = f"{patch.name} does not end {patch.target} with the call"
        if told:
            report.problems.append(Problem("close", told, file=patch.target))


def _calls(text: str) -> bool:
    """Whether a module ends with the call that closes its seams."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return False
    return [ast.dump(statement) for statement in body[-len(_CALL) :]] == _CALL


def _read(path: Path) -> str:
    return path.read_bytes().decode(errors="surrogateescape") if path.is_file() else ""


def _check_anchors(report: Report, places: Places, recorded: Recorded) -> None:
    known, wanted = recorded.by_seam(), anchored(places.planned)
    for item in wanted:
        problem = moved.check_anchor(item, places.modules.get(item.target.module), known.get(item.seam.name))
        if problem is None:
            report.matched += 1
        else:
            report.problems.append(problem)
    for seam in sorted(set(known) - {p.seam.name for p in wanted}):
        report.problems.append(Problem("anchor", f"an anchor is recorded for {seam}, but there is no such seam", seam))
