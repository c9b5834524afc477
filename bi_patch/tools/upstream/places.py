"""Finds the places of seams in a release: anchors, against the recorded ones, and modules that hold copies.

A copy is what `from module import name`, or `... as other`, at the top of another module makes: replacing the name in
its own module does not reach a copy that was made before.
"""

import ast
import difflib
import functools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from bi_patch.errors import AnchorMoved
from bi_patch.seams import anchors
from bi_patch.seams.anchors import Anchor
from bi_patch.seams.plan import Planned
from bi_patch.tools.upstream.sources import Source


class Problem(msgspec.Struct, frozen=True):
    """One thing that is not as it must be. kind: release, series, patch, close, anchor or copies."""

    kind: str
    message: str
    seam: str = ""
    target: str = ""
    file: str = ""
    diff: str = ""


def take(planned: Planned, source: Source) -> Anchor:
    """The anchor of a seam in a release. Raises AnchorMoved when its module or target is not there."""
    file = anchors.path_of(planned.target.module, source.files.__contains__)
    if file is None:
        raise AnchorMoved(f"seam {planned.seam.name}: there is no module {planned.target.module}")
    try:
        return anchors.take(planned, file, _python(source.text(file)))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise AnchorMoved(f"seam {planned.seam.name}: {file} cannot be read as Python: {error}") from error


def check_anchor(planned: Planned, source: Source, old: Anchor | None) -> Problem | None:
    """What moved since `old` was recorded, with upstream's change of that function, or None."""
    name, target = planned.seam.name, str(planned.target)
    file = anchors.path_of(planned.target.module, source.files.__contains__) or ""
    if old is None:
        return Problem("anchor", f"no anchor of {name} was recorded for {target}", name, target, file)
    try:
        new = take(planned, source)
    except AnchorMoved as error:
        near, diff = _nearest(old, _python(source.text(file))) if file else ("", "")
        return Problem("anchor", str(error) + (f"; the nearest is {near}" if near else ""), name, target, file, diff)
    if old.target != target:
        return Problem(
            "anchor", f"the anchor of {name} was recorded for {old.target}, not {target}", name, target, file
        )
    diff = anchors.compare(old, new)
    return None if diff is None else Problem("anchor", f"upstream changed {target}", name, target, file, diff)


def holders(planned: tuple[Planned, ...], source: Source) -> dict[str, list[str]]:
    """For each seam on a module's own name (not a class's): the modules that take it by `from ... import`."""
    wanted = {p.seam.name: p.target for p in planned if "." not in p.target.qualname}
    taken = _taken(source, {t.qualname for t in wanted.values()})
    found = {}
    for seam, target in wanted.items():
        have = {(target.module, target.qualname)}
        while new := {(t.module, t.held) for t in taken if (t.origin, t.name) in have} - have:
            have |= new  # a package may hand the name on
        found[seam] = sorted({module for module, _ in have} - {target.module})
    return found


def check_holders(
    planned: tuple[Planned, ...], source: Source, found: dict[str, list[str]], recorded: dict[str, list[str]]
) -> list[Problem]:
    """Modules that newly hold a copy of a seam's target, and modules that are said to but do not."""
    problems = []
    for item in planned:
        seam = item.seam.name
        for module in item.target.copies:
            # Of a range of releases, some may lack the module.
            there = anchors.path_of(module, source.files.__contains__) is not None
            if there and module not in found.get(seam, ()):
                message = f"Target.copies lists {module}, which does not take {item.target} by `from ... import`"
                problems.append(Problem("copies", message, seam, str(item.target)))
    for seam, modules in found.items():
        if new := sorted(set(modules) - set(recorded.get(seam, ()))):
            message = f"{', '.join(new)} newly hold a copy: list them in Target.copies if need be, then record"
            problems.append(Problem("copies", message, seam))
    return problems


def _python(text: str) -> str:
    """Text with the line ends that Python sees, as the recorded anchors have them."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


class _Import(NamedTuple):
    """`from origin import name as held` at the top level of `module`."""

    module: str
    origin: str
    name: str
    held: str


def _taken(source: Source, names: set[str]) -> list[_Import]:
    """Every import of these names, and of the names that they are held under."""
    taken: list[_Import] = []
    new, seen = names, set()
    while new:
        mentioned = re.compile(rb"\b(?:" + b"|".join(re.escape(name.encode()) for name in new) + rb")\b")
        found = []
        for file in sorted(source.files):
            content = source.read(file)
            if mentioned.search(content):  # a quick look; the syntax tree decides
                found += [item for item in _imports(file, content) if item.name in new]
        taken += found
        seen = seen | new
        new = {item.held for item in found} - seen
    return taken


def _imports(file: str, content: bytes) -> Iterator[_Import]:
    """Each `from ... import` at the top level of a file."""
    package = file.removesuffix(".py").split("/")
    module = ".".join(package[:-1] if package[-1] == "__init__" else package)
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return  # not importable by this Python, so it holds nothing here
    for node in _top(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield _Import(module, origin, alias.name, alias.asname or alias.name)


def _top(node: ast.AST) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt) and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
            yield from _top(child)
        elif isinstance(child, ast.ExceptHandler):
            yield from _top(child)


def _nearest(old: Anchor, text: str) -> tuple[str, str]:
    """The definition most like a lost one, with the diff to it; all of the lost one when none is near."""
    try:
        candidates = dict(_definitions(ast.parse(text), text))
    except SyntaxError:
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
    """A definition's source as ast.get_source_segment gives it, without splitting the text anew each time."""
    first, *rest = lines[node.lineno - 1 : node.end_lineno]
    return first[node.col_offset :] + "".join(rest)
