"""Declarations as data. A seam (a patch point in user-facing text) is one place in vLLM that bi_patch replaces.

The status, the docs, the patch series, the anchors and the start-up check read these declarations. No other list of
seams exists. Arming calls a seam's `close` once with the original object, and `close` returns the replacement. A
replacement is a plain function, so that torch.compile can trace it. Arming keeps the original for disarming.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from packaging.version import Version

from bi_patch.platforms import releases as known

ALL_PLATFORMS = frozenset(known.BY_PLATFORM)


@dataclass(frozen=True)
class Target:
    """The place of a seam in a range of vLLM releases.

    module, qualname: the object to replace, e.g. `vllm.v1.core.sched.scheduler`, `Scheduler.schedule`.
    releases: PEP 440 specifiers of the vLLM releases that have the object there, "" for every supported release.
    copies: modules that copy the object with `from module import name`. They get the replacement, too.
    """

    module: str
    qualname: str
    releases: str = ""
    copies: tuple[str, ...] = ()

    def holds(self, release: Version) -> bool:
        return known.holds(self.releases, release)

    def __str__(self) -> str:
        return f"{self.module}:{self.qualname}"


@dataclass(frozen=True, kw_only=True)
class _Declared:
    """The fields that seams, variables and policies share.

    name: `area.what`, unique. why: the variance that the declaration removes. releases: PEP 440 specifiers of the vLLM
    releases that need the declaration, "" for all.
    platforms: the platforms that need the declaration. The registry sets them from the folder of the declaration.
    """

    name: str
    why: str
    platforms: frozenset[str] = ALL_PLATFORMS
    releases: str = ""

    @property
    def area(self) -> str:
        return self.name.split(".", 1)[0]

    def holds(self, release: Version, platform: str) -> bool:
        return platform in self.platforms and known.holds(self.releases, release)


@dataclass(frozen=True, kw_only=True)
class Seam(_Declared):
    """One place in vLLM that bi_patch replaces.

    how: what the replacement does. until: when bi_patch can drop the seam, with upstream's issue or pull request.
    close: original -> replacement. It imports torch and vLLM only when called. causes: numbers in docs/causes.md.
    required: no engine starts while the seam is open. `bi-patch status` shows an optional seam that is open.
    serves: names of vLLM's layer classes, or of their base classes, for whose operations this seam is responsible.
    op: the module of ops/ that computes for this seam, if the seam's own code can have left the stack by then.
    on_import: the start-up check does not load the target's module, because the module is large, and only some
    processes need it. The seam closes where the module is loaded.
    relies: what the replacement calls and counts on, as a name in the target's module, or as `module:name`. They have
    anchors, too.
    """

    targets: tuple[Target, ...]
    close: Callable[[Any], Any] = field(repr=False)
    how: str
    until: str
    required: bool = True
    causes: tuple[int, ...] = ()
    serves: tuple[str, ...] = ()
    op: str = ""
    on_import: bool = False
    relies: tuple[str, ...] = ()

    def target(self, release: Version) -> Target | None:
        """The seam's place in `release`, or None if that release does not need the seam."""
        return next((t for t in self.targets if t.holds(release)), None)


@dataclass(frozen=True, kw_only=True)
class Variable(_Declared):
    """An environment variable that vLLM or a library reads. Arming sets it in every process before they are imported.

    force: if the user set another value, True makes that an error, and False keeps the user's value.
    """

    variable: str
    value: str
    force: bool = True


@dataclass(frozen=True, kw_only=True)
class Policy(_Declared):
    """A rule on the finished engine configuration (`vllm.config.VllmConfig`).

    apply: config -> None. It raises UnsupportedFeature to refuse the configuration, or sets a field to a safe value.
    It runs in every process that builds a VllmConfig, and once more in each worker before the model loads.
    """

    apply: Callable[[Any], None] = field(repr=False)


@dataclass(frozen=True)
class Catalog:
    """Every seam, environment variable and policy, in a fixed order."""

    seams: tuple[Seam, ...]
    variables: tuple[Variable, ...]
    policies: tuple[Policy, ...]

    def __add__(self, other: "Catalog") -> "Catalog":
        return Catalog(self.seams + other.seams, self.variables + other.variables, self.policies + other.policies)
