"""The plan: which seams, variables and policies hold for one vLLM release on one platform, and where."""

from dataclasses import dataclass
from functools import cached_property

from packaging.version import Version

from bi_patch.errors import UnsupportedRelease
from bi_patch.platforms import releases
from bi_patch.seams.model import Catalog, Policy, Seam, Target, Variable


@dataclass(frozen=True)
class Planned:
    """A seam with its place in this release."""

    seam: Seam
    target: Target


@dataclass(frozen=True)
class Plan:
    release: Version
    platform: str
    seams: tuple[Planned, ...]
    variables: tuple[Variable, ...]
    policies: tuple[Policy, ...]

    @cached_property
    def by_module(self) -> dict[str, tuple[Planned, ...]]:
        """Planned seams keyed by the module that holds the target."""
        modules: dict[str, list[Planned]] = {}
        for planned in self.seams:
            modules.setdefault(planned.target.module, []).append(planned)
        return {name: tuple(items) for name, items in modules.items()}

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Every module that the plan touches, those with copies of a target included."""
        names = [m for p in self.seams for m in (p.target.module, *p.target.copies)]
        return tuple(dict.fromkeys(names))


def make(catalog: Catalog, release: Version, platform: str) -> Plan:
    """The plan for a release and a platform. Raises UnsupportedRelease for a release without checked seams."""
    supported = releases.BY_PLATFORM[platform]
    if str(release) not in releases.ALL:
        raise UnsupportedRelease(
            f"vLLM {release} is not supported: the seams are checked for {', '.join(releases.ALL)}. "
            "Install one of these, or set BI_PATCH=0 to run vLLM without bi_patch"
        )
    if str(release) not in supported:
        raise UnsupportedRelease(
            f"vLLM {release} is not supported on {platform}, where bi_patch needs vLLM {', '.join(supported)}. "
            "Install such a release, or set BI_PATCH=0"
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
