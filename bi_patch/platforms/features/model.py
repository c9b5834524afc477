"""A row of the feature table: a feature, and its state on each platform with the evidence or the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from bi_patch.platforms import releases as known

SERVED, REFUSED, UNTRIED, ABSENT = "served", "refused", "untried", "not in vLLM"
TITLES = {"cpu": "CPU", "cuda": "CUDA", "ascend": "Ascend"}


@dataclass(frozen=True)
class Cell:
    """The state of a feature on one platform.

    state: SERVED: measured, with evidence. REFUSED: bi_patch refuses the engine or the request, and names the feature.
    UNTRIED: bi_patch covers every layer and operation, and nobody measured the whole. The engine starts.
    ABSENT: this build of vLLM lacks the feature.
    evidence: files under benchmarks/results that prove SERVED. why: the reason for REFUSED, or a remark.
    todo: what a user can do instead. by: the seam or policy that refuses, or "" for the policy of the feature table.
    releases: PEP 440 specifiers of the cell's vLLM releases, "" for all.
    """

    state: str
    evidence: tuple[str, ...] = ()
    why: str = ""
    todo: str = ""
    by: str = ""
    releases: str = ""


def served(*evidence: str, why: str = "", releases: str = "") -> Cell:
    return Cell(SERVED, evidence, why, releases=releases)


def refused(why: str, *, todo: str = "", by: str = "", releases: str = "") -> Cell:
    return Cell(REFUSED, (), why, todo, by, releases)


def untried(why: str = "", releases: str = "") -> Cell:
    return Cell(UNTRIED, (), why, releases=releases)


def absent(why: str = "", releases: str = "") -> Cell:
    return Cell(ABSENT, (), why, releases=releases)


# config (vllm.config.VllmConfig) -> the words for an error if the configuration uses the feature, else "".
Asked = Callable[[Any], str]


@dataclass(frozen=True)
class Feature:
    """One row. name: the users' name of the feature. cells: by platform, the first cell for a release counts.

    short: the row's name in the README's table, or "" if that table leaves the row out.
    asked: tells whether a finished engine configuration uses the feature. None: the configuration cannot tell, and a
    seam or a policy refuses (Cell.by). details: one sentence for the docs.
    """

    name: str
    cells: Mapping[str, tuple[Cell, ...]]
    asked: Asked | None = None
    details: str = ""
    short: str = ""

    def cell(self, platform: str, release: Version | None = None) -> Cell:
        """The cell for a platform and a release. None means the newest release of the platform."""
        at = release or Version(known.BY_PLATFORM[platform][-1])
        return next((c for c in self.cells.get(platform, ()) if known.holds(c.releases, at)), UNKNOWN)


# The cell of a platform that a row does not mention.
UNKNOWN = Cell(REFUSED, (), "nobody has examined it")


def row(
    name: str,
    *,
    cpu: Cell | tuple[Cell, ...],
    cuda: Cell | tuple[Cell, ...],
    ascend: Cell | tuple[Cell, ...],
    asked: Asked | None = None,
    details: str = "",
    short: str = "",
) -> Feature:
    """A Feature with one cell for each platform, or with several cells by release."""
    given = {"cpu": cpu, "cuda": cuda, "ascend": ascend}
    cells = {platform: held if isinstance(held, tuple) else (held,) for platform, held in given.items()}
    return Feature(name, cells, asked, details, short)
