"""Writes the result files' tables as Markdown, into pages and as plots, and says which code the tables measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from bi_patch import identity
from bi_patch.tools import evidence, marks
from bi_patch.tools.bench import cost, plot
from bi_patch.tools.evidence import summary
from bi_patch.tools.evidence.kinds import KINDS
from bi_patch.tools.evidence.store import Table

BARS = 60  # bars in a plot
_EVIDENCE_MARK = re.compile(rf"<!-- ((?:summary|{'|'.join(kind.kind for kind in KINDS)})-\S+) -->")


def blocks(tables: Mapping[str, Table]) -> dict[str, str]:
    """The Markdown of each table and of each summary, by the mark."""
    return {**{mark: evidence.markdown(table) for mark, table in tables.items()}, **summary.blocks(tables)}


def distinct(tables: Mapping[str, Table]) -> dict[str, Table]:
    """Each table once, by the table's shortest mark."""
    found: dict[int, str] = {}
    for mark in sorted(tables, key=len):
        found.setdefault(id(tables[mark]), mark)
    return {mark: tables[mark] for mark in sorted(found.values())}


def pages(root: Path) -> list[Path]:
    """The README and the pages under docs/ of a source tree."""
    return [page for page in (root / "README.md", *sorted((root / "docs").rglob("*.md"))) if page.is_file()]


def marked(page: Path, made: Mapping[str, str]) -> bool:
    """Whether a page has a mark of a table, known or unknown."""
    text = page.read_text(encoding="utf-8")
    return bool(marks.held(text, made) or _unknown(text, made))


def write(page: Path, made: Mapping[str, str]) -> int:
    """Renew the tables of a page and return their number. Raises MarksMissing or OSError."""
    text = page.read_text(encoding="utf-8")
    if unknown := _unknown(text, made):
        raise marks.MarksMissing(f"{page}: no result file supplies {', '.join(unknown)}, only {', '.join(made)}")
    held = marks.held(text, made)
    if not held:
        some = ", ".join(f"<!-- {mark} -->" for mark in made)
        raise marks.MarksMissing(f"{page} has no mark of a table; the marks are {some}")
    page.write_text(marks.renew(text, made), encoding="utf-8")
    return len(held)


def outdated(page: Path, made: Mapping[str, str]) -> list[str]:
    """The marks in a page whose table is outdated or supplied by no file. Raises MarksMissing."""
    text = page.read_text(encoding="utf-8")
    return [*_unknown(text, made), *marks.stale(text, made)]


def _unknown(text: str, made: Mapping[str, str]) -> list[str]:
    return [mark for mark in _EVIDENCE_MARK.findall(text) if mark not in made]


def draw(tables: Mapping[str, Table], folder: Path) -> list[Path]:
    """Plot each device's newest cost table as `cost-<device>.svg`, and return the paths. Raises PlotsMissing.

    A table of more than BARS rows has no plot: nobody could read it.
    """
    drawn = []
    for mark, table in distinct(tables).items():
        if table.kind is evidence.Cost and mark == table.name and len(table.rows) <= BARS:
            drawn.append(folder / f"{mark}.svg")
            plot.cost(table.evidence, drawn[-1], cost.target(table.newest.evidence.platform))
    return drawn


def origins(mark: str, table: Table) -> Iterable[tuple[bool, str]]:
    """For each file behind a table: whether the file measured this tree's serving code, and a sentence about it."""
    tree = identity.digest()
    for source in table.sources:
        found = source.evidence
        if found.digest == tree:
            yield True, f"{mark}: {source.path.name} measured the code of this tree"
        elif found.digest:
            yield (
                False,
                f"{mark}: {source.path.name} measured other code: {evidence.commit(found)}, digest "
                f"{found.digest[:12]}; this tree has {tree[:12]}",
            )
        else:
            yield False, f"{mark}: {source.path.name} does not say which code it measured ({found.date})"
