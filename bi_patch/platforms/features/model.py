"""What a row of the feature table is: a feature and, per platform, its state with the evidence or the reason."""

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

    state: SERVED: measured, with its evidence. REFUSED: the engine does not start, or the request is turned down, with
    the feature's name. UNTRIED: every layer and operation is covered, and nobody measured the whole; it starts.
    ABSENT: this build of vLLM does not have it.
    evidence: files under benchmarks/results that back SERVED. why: the reason for REFUSED, or a remark. todo: what a
    user can do instead. by: the seam or policy that refuses, where it is not the feature table's own policy.
    releases: PEP 440 specifiers of the vLLM releases that the cell is about, "" for all.
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


def absent(why: str = "") -> Cell:
    return Cell(ABSENT, (), why)


# config (vllm.config.VllmConfig) -> what was asked for, in words for an error; "" where it was not.
Asked = Callable[[Any], str]


@dataclass(frozen=True)
class Feature:
    """One row. name: as users call it. cells: by platform; of several cells of a platform the first that holds counts.

    short: the row's name in the README's table, "" where the table leaves the row out.
    asked: reads off the finished engine configuration whether the feature is asked for; None where the configuration
    does not say so: a seam or policy then refuses (Cell.by). details: one sentence for the docs.
    """

    name: str
    cells: Mapping[str, tuple[Cell, ...]]
    asked: Asked | None = None
    details: str = ""
    short: str = ""

    def cell(self, platform: str, release: Version | None = None) -> Cell:
        """The state on a platform, for a release or (None) for its newest."""
        at = release or Version(known.BY_PLATFORM[platform][-1])
        return next((c for c in self.cells.get(platform, ()) if known.holds(c.releases, at)), UNKNOWN)


# What no row speaks of is not covered.
UNKNOWN = Cell(REFUSED, (), "nobody has looked at it")


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
    """A Feature with one cell, or several by release, for each platform."""
    given = {"cpu": cpu, "cuda": cuda, "ascend": ascend}
    cells = {platform: held if isinstance(held, tuple) else (held,) for platform, held in given.items()}
    return Feature(name, cells, asked, details, short)
