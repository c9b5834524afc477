"""The plan: the seams, variables and policies that one vLLM release on one platform needs, with their places."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from packaging.version import Version

from bi_patch.errors import UnsupportedRelease
from bi_patch.platforms import releases
from bi_patch.seams.model import Catalog, Policy, Seam, Target, Variable


@dataclass(frozen=True)
class Planned:
    """A seam with its place in the plan's release."""

    seam: Seam
    target: Target


def anchored(seams: Iterable[Planned]) -> tuple[Planned, ...]:
    """What has an anchor: each seam's target, and what its replacement relies on, as `seam > name`."""
    found = []
    for item in seams:
        found.append(item)
        for relied in item.seam.relies:
            module, _, name = relied.rpartition(":")
            target = replace(item.target, module=module or item.target.module, qualname=name, copies=())
            found.append(Planned(replace(item.seam, name=f"{item.seam.name} > {name}"), target))
    return tuple(found)


@dataclass(frozen=True)
class Plan:
    release: Version
    platform: str
    seams: tuple[Planned, ...]
    variables: tuple[Variable, ...]
    policies: tuple[Policy, ...]

    @cached_property
    def by_module(self) -> dict[str, tuple[Planned, ...]]:
        """The planned seams by the module that holds their target."""
        modules: dict[str, list[Planned]] = {}
        for planned in self.seams:
            modules.setdefault(planned.target.module, []).append(planned)
        return {name: tuple(items) for name, items in modules.items()}

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Every module that holds a target or a copy of a target."""
        names = [m for p in self.seams for m in (p.target.module, *p.target.copies)]
        return tuple(dict.fromkeys(names))


def make(catalog: Catalog, release: Version, platform: str) -> Plan:
    """The plan for a release and a platform. Raises UnsupportedRelease for a release that bi_patch does not support."""
    supported = releases.BY_PLATFORM[platform]
    if str(release) not in releases.ALL:
        raise UnsupportedRelease(
            f"vLLM {release} is not supported. bi_patch supports vLLM {', '.join(releases.ALL)}. "
            "Install a supported release, or set BI_PATCH=0 to run vLLM without bi_patch"
        )
    if str(release) not in supported:
        raise UnsupportedRelease(
            f"vLLM {release} is not supported on {platform}. There bi_patch supports vLLM {', '.join(supported)}. "
            "Install a supported release, or set BI_PATCH=0 to run vLLM without bi_patch"
        )
    planned = []
    for seam in catalog.seams:
        target = seam.target(release) if seam.holds(release, platform) else None
        if target is not None:
            planned.append(Planned(seam, target))
    return Plan(
        release,
        platform,
        tuple(planned),
        tuple(v for v in catalog.variables if v.holds(release, platform)),
        tuple(p for p in catalog.policies if p.holds(release, platform)),
    )
