"""Finds the modules that hold a copy of a seam's target.

`from module import name` (or `... as other`) at the top level of another module makes a copy. Replacing the name in its
own module does not change an earlier copy.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from bi_patch.seams.model import Target
from bi_patch.tools.upstream.sources import Source


def holders(targets: Mapping[str, Target], source: Source) -> dict[str, list[str]]:
    """For each seam, the modules that import its target with `from ... import`.

    targets: by seam, only targets that are module-level names.
    """
    taken = _taken(source, {t.qualname for t in targets.values()})
    found = {}
    for seam, target in targets.items():
        have = {(target.module, target.qualname)}
        while new := {(t.module, t.held) for t in taken if (t.origin, t.name) in have} - have:
            have |= new  # a module may import the name from another copy
        found[seam] = sorted({module for module, _ in have} - {target.module})
    return found


class _Import(NamedTuple):
    """`from origin import name as held` at the top level of `module`."""

    module: str
    origin: str
    name: str
    held: str


def _taken(source: Source, names: set[str]) -> list[_Import]:
    """Every import of these names, and of the names under which copies are held."""
    taken: list[_Import] = []
    new, seen = names, set()
    while new:
        mentioned = re.compile(rb"\b(?:" + b"|".join(re.escape(name.encode()) for name in new) + rb")\b")
        found = []
        for file in sorted(source.files):
            content = source.read(file)
            if mentioned.search(content):  # a quick test; the syntax tree decides
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
        return  # this Python cannot import the file, so the file holds no copy
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
