"""The whole feature table, and its answer for an engine's configuration."""

from __future__ import annotations

from typing import Any

from packaging.version import Version

from bi_patch.errors import UnsupportedFeature
from bi_patch.platforms.features.beside import BESIDE
from bi_patch.platforms.features.engine import FEATURES
from bi_patch.platforms.features.families import FAMILIES
from bi_patch.platforms.features.images import IMAGES
from bi_patch.platforms.features.matrix import MATRIX
from bi_patch.platforms.features.model import REFUSED, TITLES, UNTRIED, Cell, Feature
from bi_patch.platforms.features.pairs import PAIRS
from bi_patch.platforms.features.quantization import QUANTIZATION
from bi_patch.platforms.features.recurrent import RECURRENT
from bi_patch.platforms.features.versions import VERSIONS

ROWS: tuple[Feature, ...] = (*FEATURES, *IMAGES, *PAIRS, *BESIDE, *MATRIX, *RECURRENT, *QUANTIZATION, *FAMILIES)


def refusals(config: Any, platform: str, release: Version) -> dict[str, tuple[str, Cell]]:
    """The refused features that a finished configuration uses: name -> (words for an error, the cell).

    config: a vllm.config.VllmConfig.
    """
    found = {}
    for feature in ROWS:
        cell = feature.cell(platform, release)
        if cell.state == REFUSED and feature.asked is not None and (asked := feature.asked(config)):
            found[feature.name] = asked, cell
    return found


def check(config: Any, platform: str, release: Version) -> None:
    """Raise UnsupportedFeature if a finished configuration uses refused features."""
    found = refusals(config, platform, release)
    if not found:
        return
    said = "; ".join(f"{asked}: {cell.why}" for asked, cell in found.values())
    todo = " ".join(dict.fromkeys(f"{cell.todo or 'Turn it off'}." for _, cell in found.values()))
    raise UnsupportedFeature(
        f"features: batch invariance on {TITLES[platform]} does not cover {said}. {todo} "
        "Or set BI_PATCH=0 to run vLLM without bi_patch"
    )


def untried(config: Any, platform: str, release: Version) -> tuple[str, ...]:
    """What a finished configuration uses, as far as it can tell, and what the table calls untried."""
    used = [f for f in ROWS if f.asked is not None and f.cell(platform, release).state == UNTRIED and f.asked(config)]
    version = VERSIONS[platform].get(str(release))
    newer = [f"vLLM {release} on {TITLES[platform]}"] if version is None or version.state == UNTRIED else []
    return (*newer, *(feature.name for feature in used))
