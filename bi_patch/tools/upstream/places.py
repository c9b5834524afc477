"""Finds the modules of a release's seams in one source. `locate` looks up each module once; callers read `Places`."""

from collections.abc import Mapping
from dataclasses import dataclass

from bi_patch.seams import anchors
from bi_patch.seams.plan import Planned, anchored
from bi_patch.tools.upstream import imports
from bi_patch.tools.upstream.sources import Source


@dataclass(frozen=True)
class Module:
    """A module of a source. file: the path, e.g. `vllm/config/vllm.py`.

    text: the content with its own line ends. Bytes that are not UTF-8 become surrogates, which Python refuses to parse.
    """

    file: str
    text: str


@dataclass(frozen=True)
class Places:
    """A release's seams in one source.

    modules: by name, each module of a target, of `Target.copies` or of `Seam.relies` that the source has. copies: for
    each seam whose target is a module-level name, the modules that import the name with `from ... import`, whether
    listed or not.
    """

    source: Source
    planned: tuple[Planned, ...]
    modules: Mapping[str, Module]
    copies: Mapping[str, list[str]]


def locate(source: Source, planned: tuple[Planned, ...]) -> Places:
    """Find the module of each seam, and each module that holds a copy, in a source."""
    modules = {}
    for name in sorted({m for p in anchored(planned) for m in (p.target.module, *p.target.copies)}):
        if file := anchors.path_of(name, source.files.__contains__):
            modules[name] = Module(file, source.read(file).decode(errors="surrogateescape"))
    targets = {p.seam.name: p.target for p in planned if "." not in p.target.qualname}
    return Places(source, planned, modules, imports.holders(targets, source))
