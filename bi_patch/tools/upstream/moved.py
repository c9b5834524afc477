"""Finds what upstream changed: targets that differ from their anchors, and copies that are new or gone."""

import ast
import difflib
import functools
from collections.abc import Callable, Iterator, Mapping

from bi_patch.errors import AnchorMoved
from bi_patch.seams import anchors
from bi_patch.seams.anchors import Anchor
from bi_patch.seams.plan import Planned
from bi_patch.tools.upstream.places import Module, Places
from bi_patch.tools.upstream.report import Problem


def take(planned: Planned, module: Module | None) -> Anchor:
    """A seam's anchor in its module. Raises AnchorMoved when the module is None or does not define the target."""
    if module is None:
        raise AnchorMoved(f"seam {planned.seam.name}: there is no module {planned.target.module}")
    try:
        return anchors.take(planned, module.file, _python(module.text))
    except (SyntaxError, ValueError) as error:
        raise AnchorMoved(f"seam {planned.seam.name}: {module.file} cannot be read as Python: {error}") from error


def check_anchor(planned: Planned, module: Module | None, old: Anchor | None) -> Problem | None:
    """The problem with a seam's anchor, with upstream's change of the target; None when the target is unchanged."""
    name, target, file = planned.seam.name, str(planned.target), module.file if module else ""
    if old is None:
        return Problem("anchor", f"no anchor of {name} was recorded for {target}", name, target, file)
    try:
        new = take(planned, module)
    except AnchorMoved as error:
        near, diff = _nearest(old, _python(module.text)) if module else ("", "")
        return Problem("anchor", str(error) + (f"; the nearest is {near}" if near else ""), name, target, file, diff)
    if old.target != target:
        return Problem(
            "anchor", f"the anchor of {name} was recorded for {old.target}, not {target}", name, target, file
        )
    diff = anchors.compare(old, new)
    return None if diff is None else Problem("anchor", f"upstream changed {target}", name, target, file, diff)


def check_copies(places: Places, recorded: Mapping[str, list[str]]) -> list[Problem]:
    """Problems with copies: modules that newly hold a copy of a target, and listed modules that hold no copy."""
    problems = []
    for item in places.planned:
        seam = item.seam.name
        for module in item.target.copies:
            # A range of releases may include some without the module.
            if module in places.modules and module not in places.copies.get(seam, ()):
                message = f"Target.copies lists {module}, which does not import {item.target} with `from ... import`"
                problems.append(Problem("copies", message, seam, str(item.target)))
    for seam, modules in places.copies.items():
        if new := sorted(set(modules) - set(recorded.get(seam, ()))):
            message = (
                f"these modules newly hold a copy: {', '.join(new)}. List each in Target.copies if it must get the "
                "replacement, then run `bi-patch check --write`"
            )
            problems.append(Problem("copies", message, seam))
    return problems


def _python(text: str) -> str:
    """The text with Python's line ends, which the recorded anchors have."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _nearest(old: Anchor, text: str) -> tuple[str, str]:
    """The name of the definition most similar to a lost target, and the diff; without one, "" and the lost source."""
    try:
        candidates = dict(_definitions(ast.parse(text), text))
    except (SyntaxError, ValueError):
        candidates = {}
    matcher = difflib.SequenceMatcher(autojunk=False)
    matcher.set_seq2(old.source.splitlines())
    best, score = "", 0.5
    for name, source in candidates.items():
        matcher.set_seq1(source.splitlines())
        if matcher.real_quick_ratio() > score and matcher.quick_ratio() > score and (ratio := matcher.ratio()) > score:
            best, score = name, ratio
    new = candidates[best].splitlines() if best else []
    lines = difflib.unified_diff(old.source.splitlines(), new, f"recorded/{old.file}", f"found/{old.file}", lineterm="")
    return best, "\n".join(lines)


def _definitions(tree: ast.AST, text: str) -> Iterator[tuple[str, str]]:
    lines = text.splitlines(keepends=True)

    def walk(node: ast.AST, prefix: str, keep: Callable[[ast.AST], str]) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield prefix + child.name, keep(child)
                yield from walk(child, f"{prefix}{child.name}.", keep)

    return walk(tree, "", functools.partial(_segment, lines))


def _segment(lines: list[str], node: ast.AST) -> str:
    """A definition's source, like ast.get_source_segment, which would split the whole text for every definition."""
    first, *rest = lines[node.lineno - 1 : node.end_lineno]
    return first[node.col_offset :] + "".join(rest)
