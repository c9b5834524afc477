"""The feature table as Markdown for the README and the documentation, and as plain text for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from packaging.version import Version

from bi_patch.platforms import releases
from bi_patch.platforms.features import table
from bi_patch.platforms.features.beside import BESIDE
from bi_patch.platforms.features.cards import CARDS
from bi_patch.platforms.features.engine import FEATURES
from bi_patch.platforms.features.families import FAMILIES
from bi_patch.platforms.features.images import IMAGES
from bi_patch.platforms.features.matrix import MATRIX
from bi_patch.platforms.features.model import REFUSED, SERVED, TITLES, UNTRIED, Cell, Feature
from bi_patch.platforms.features.pairs import PAIRS
from bi_patch.platforms.features.quantization import QUANTIZATION
from bi_patch.platforms.features.recurrent import RECURRENT
from bi_patch.platforms.features.versions import VERSIONS

# The full tables, by the name of their marks: what their first column holds, and their rows.
_TABLES: dict[str, tuple[str, tuple[Feature, ...]]] = {
    "features": ("feature", (*FEATURES, *IMAGES)),
    "pairs": ("both together", (*PAIRS, *BESIDE, *MATRIX)),
    "recurrent": ("layers", RECURRENT),
    "quantization": ("weights", QUANTIZATION),
    "families": ("models", FAMILIES),
}
_WORSE = (SERVED, UNTRIED, REFUSED)
_STATES = {SERVED: "**served**", REFUSED: "refused", UNTRIED: "untried"}


def blocks() -> dict[str, str]:
    """The generated tables by the name of their marks. A page marks the table "features" with `<!-- features -->`."""
    return {
        "support": _short([row for row in table.ROWS if row.short]),
        **{name: _full(rows, what) for name, (what, rows) in _TABLES.items()},
        "cards": _cards(),
        "releases": _releases(),
    }


def states() -> list[list[str]]:
    """Every row in short, for a terminal: its state on each platform, and its name. A head begins each table."""
    lines = []
    for what, rows in _TABLES.values():
        lines += ([""] * 4, [*TITLES.values(), what.upper()])
        lines += ([*(row.cell(platform).state for platform in TITLES), row.name] for row in rows)
    return lines[1:]


def found(texts: Sequence[str]) -> list[str]:
    """The rows that name all of these texts, in any case, as plain text: name, states and remarks."""
    rows = (row for name in ("families", "features", "quantization", "recurrent", "pairs") for row in _TABLES[name][1])
    said = [(row, " ".join((row.name, *_remarks(row))).lower()) for row in rows]
    return [_plain(row) for row, words in said if all(text.lower() in words for text in texts)]


def _plain(row: Feature) -> str:
    states = ", ".join(f"{title} {row.cell(platform).state}" for platform, title in TITLES.items())
    return "\n  ".join([row.name, states, *_remarks(row)])


def _short(rows: Iterable[Feature]) -> str:
    """One line for all features with the same states, in the order of the first of them."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        groups.setdefault(tuple(_state(row.cell(platform)) for platform in TITLES), []).append(row.short)
    lines = [["; ".join(_merged(names)), *states] for states, names in groups.items()]
    return _table(["", *TITLES.values()], lines) + "\n\n" + _MEANING


def _merged(names: Iterable[str]) -> list[str]:
    """Names "kind (A)" and "kind (B)" as one, "kind (A, B)", in the place of the first."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind, _, inner = name.removesuffix(")").partition(" (")
        kinds.setdefault(kind, []).append(inner)
    return [f"{kind} ({', '.join(inner)})" if all(inner) else kind for kind, inner in kinds.items()]


_MEANING = (
    "**served**: measured, with an evidence file under `benchmarks/results/`. untried: every layer is covered and the "
    "engine starts; nobody measured the whole. refused: the engine stops with the name of the feature before the first "
    "token."
)


def _full(rows: Sequence[Feature], what: str) -> str:
    lines = [
        [row.name, *(_state(row.cell(platform)) for platform in TITLES), "<br>".join(_remarks(row)), _evidence(row)]
        for row in rows
    ]
    return _table([what, *TITLES.values(), "why, and what to do", "evidence"], lines)


def _remarks(row: Feature) -> list[str]:
    """What older releases lack, the reasons and advice of the cells. Platforms with the same text share a remark."""
    said: dict[str, list[str]] = {}
    for platform, title in TITLES.items():
        cell = row.cell(platform)
        text = ". ".join(filter(None, (cell.why, cell.todo)))
        text = "; ".join(filter(None, (_before(row, platform), text)))
        if text:
            said.setdefault(text, []).append(title)
    remarks = [
        words if len(titles) == len(TITLES) else f"{', '.join(titles)}: {words}" for words, titles in said.items()
    ]
    return [*remarks, row.details] if row.details else remarks


def _before(row: Feature, platform: str) -> str:
    """Words for older releases whose state is worse than the newest one's, for example "refused before vLLM 0.33"."""
    held = releases.BY_PLATFORM[platform]
    states = [row.cell(platform, Version(release)).state for release in held]
    if not set(states) <= set(_WORSE):
        return ""
    worse = [i for i, state in enumerate(states) if _WORSE.index(state) > _WORSE.index(states[-1])]
    if not worse:
        return ""
    first = Version(held[worse[-1] + 1])
    words = " or ".join(dict.fromkeys(states[i] for i in worse))
    return f"{words} before vLLM {first.major}.{first.minor}"


def _evidence(row: Feature) -> str:
    return "<br>".join(dict.fromkeys(_link(file) for platform in TITLES for file in row.cell(platform).evidence))


def _link(file: str) -> str:
    """A link from a page under docs/ to a result file, by the file's day, device and topic."""
    named = re.fullmatch(r"[a-z]+-(\d{4}-\d\d-\d\d)-(.*)-vllm-([\d.]+\d)(-\d+)?\.json", file)
    words = f"{named[2]}{named[4] or ''}, {named[1]}, vLLM {named[3]}" if named else file
    return f"[{words}](../benchmarks/results/{file})"


def _cards() -> str:
    lines = []
    for card in CARDS:
        cell = card.cell
        state = _state(cell)
        lines.append([card.name, state, cell.why or "<br>".join(_link(file) for file in cell.evidence)])
    return _table(["device", "bf16 models", "why"], lines)


def _releases() -> str:
    lines = [
        [release, *(_state(VERSIONS[p][release]) if release in VERSIONS[p] else "" for p in TITLES)]
        for release in reversed(releases.ALL)
    ]
    return _table(["vLLM", *TITLES.values()], lines) + "\n\nEvery other release is refused."


def _state(cell: Cell) -> str:
    return _STATES.get(cell.state, cell.state)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
