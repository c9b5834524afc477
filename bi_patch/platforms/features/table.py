"""The whole table, and what it says of an engine's configuration."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from packaging.version import Version

from bi_patch.errors import UnsupportedFeature
from bi_patch.platforms.features.engine import FEATURES
from bi_patch.platforms.features.families import FAMILIES
from bi_patch.platforms.features.model import REFUSED, TITLES, Cell, Feature

ROWS: tuple[Feature, ...] = (*FEATURES, *FAMILIES)


def refusals(config: Any, platform: str, release: Version) -> dict[str, tuple[str, Cell]]:
    """Rows that a finished configuration asks for and that are refused: name -> (what was asked for, the cell).

    config: a vllm.config.VllmConfig.
    """
    found = {}
    for feature in ROWS:
        cell = feature.cell(platform, release)
        if cell.state == REFUSED and feature.asked is not None and (asked := feature.asked(config)):
            found[feature.name] = asked, cell
    return found


def check(config: Any, platform: str, release: Version, lifted: Collection[str] = ()) -> None:
    """Raise UnsupportedFeature where a finished configuration asks for what is refused.

    lifted: names of rows that are not looked at: the tests of refusals pass them.
    """
    found = {name: held for name, held in refusals(config, platform, release).items() if name not in lifted}
    if not found:
        return
    said = "; ".join(f"{asked}: {cell.why}" for asked, cell in found.values())
    todo = " ".join(dict.fromkeys(f"{cell.todo or 'Turn it off'}." for _, cell in found.values()))
    raise UnsupportedFeature(
        f"features: batch invariance on {TITLES[platform]} does not cover {said}. {todo} "
        "BI_PATCH=0 runs vLLM without bi_patch"
    )
