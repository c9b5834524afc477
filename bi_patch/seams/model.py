"""What a seam is: one place in vLLM that is intercepted, declared as data.

Status, docs, the patch series, the anchors and the checks all read these declarations; nothing else lists seams.
A seam's `close` is called once with the original object and returns what takes its place. It is a plain
function so that torch.compile can trace what it returns, and the original is kept for disarming.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from packaging.version import Version

from bi_patch.platforms import releases as known

ALL_PLATFORMS = frozenset(known.BY_PLATFORM)


@dataclass(frozen=True)
class Target:
    """Where a seam is in a range of vLLM releases.

    module, qualname: the object that is replaced, e.g. `vllm.v1.core.sched.scheduler`, `Scheduler.schedule`.
    releases: PEP 440 specifiers of the vLLM releases in which it is there; "" for every supported release.
    copies: modules that took the object with `from module import name` and must be given the replacement too.
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
    """What seams, variables and policies have in common.

    name: `area.what`, unique. why: which variance it removes. releases: PEP 440 specifiers, "" for all.
    platforms: where it holds. The registry fills it in from the folder that holds the declaration.
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
    """One intercepted place.

    how: what takes its place. until: when it can go. close: original -> replacement (imports torch and vLLM only when
    called). causes: numbers of docs/causes.md. required: the engine must not start while it is open; an optional seam
    that is open only shows in `bi-patch status`. serves: vLLM's layers, by the name of a class in their ancestry, whose
    operations this seam answers for. op: the module of ops/ that computes for this seam, where the seam's own
    code may no longer be on the stack by then.
    """

    targets: tuple[Target, ...]
    close: Callable[[Any], Any] = field(repr=False)
    how: str
    until: str
    required: bool = True
    causes: tuple[int, ...] = ()
    serves: tuple[str, ...] = ()
    op: str = ""

    def target(self, release: Version) -> Target | None:
        """The seam's place in `release`, or None where that release does not have it."""
        return next((t for t in self.targets if t.holds(release)), None)


@dataclass(frozen=True, kw_only=True)
class Variable(_Declared):
    """An environment variable that vLLM or a library reads: set before either is imported, in every process.

    force: another value that the user set is an error (True) or is kept (False: a default only).
    """

    variable: str
    value: str
    force: bool = True


@dataclass(frozen=True, kw_only=True)
class Policy(_Declared):
    """A rule on the finished engine configuration (`vllm.config.VllmConfig`).

    apply: config -> None. It refuses by raising UnsupportedFeature, or sets a field where a safe value exists.
    Runs in every process that builds a VllmConfig, and once more before the first request.
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
