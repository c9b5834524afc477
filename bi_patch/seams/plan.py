"""The plan: which seams, settings and policies hold for one vLLM release on one platform, and where."""

from dataclasses import dataclass
from functools import cached_property

from packaging.version import Version

from bi_patch.errors import UnsupportedRelease
from bi_patch.seams.model import Policy, Seam, Setting, Target
from bi_patch.seams.registry import PLATFORM_RELEASES, POLICIES, RELEASES, SEAMS, SETTINGS


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
    settings: tuple[Setting, ...]
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


def make(release: Version, platform: str) -> Plan:
    """The plan for a release and a platform. Raises UnsupportedRelease for a release without checked seams."""
    if str(release) not in RELEASES:
        raise UnsupportedRelease(
            f"vLLM {release} is not supported: the seams are checked for {', '.join(RELEASES)}. "
            "Install one of these, or set BI_PATCH=0 to run vLLM without bi_patch"
        )
    if not Target("", "", PLATFORM_RELEASES[platform]).holds(release):
        raise UnsupportedRelease(
            f"vLLM {release} is not supported on {platform}, where bi_patch needs vLLM {PLATFORM_RELEASES[platform]}. "
            "Install such a release, or set BI_PATCH=0"
        )
    planned = []
    for seam in SEAMS:
        target = seam.target(release) if platform in seam.platforms else None
        if target is not None:
            planned.append(Planned(seam, target))
    return Plan(
        release,
        platform,
        tuple(planned),
        tuple(s for s in SETTINGS if platform in s.platforms and _holds(s, release)),
        tuple(p for p in POLICIES if platform in p.platforms and _holds(p, release)),
    )


def _holds(item: Setting | Policy, release: Version) -> bool:
    return Target("", "", item.releases).holds(release)
