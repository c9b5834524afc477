"""What a seam is: one place in vLLM that is intercepted, declared as data.

Status, docs, the patch series, the anchors and the checks all read these declarations; nothing else lists seams.
A seam's `close` is called once with the original object and returns what takes its place. It is a plain
function so that torch.compile can trace what it returns, and the original is kept for disarming.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

# A required seam that is open stops the engine; an optional one is shown by `bi-patch status` only.
ALL_PLATFORMS = frozenset({"cpu", "cuda", "ascend"})
CPU, CUDA = frozenset({"cpu"}), frozenset({"cuda"})
# The CPU build's seams begin later than the project's.
CPU_RELEASES = ">=0.32,<0.34"


@dataclass(frozen=True)
class Target:
    """Where a seam is in a range of vLLM releases.

    module, qualname: the object that is replaced, e.g. `vllm.v1.core.sched.scheduler`, `Scheduler.schedule`.
    releases: PEP 440 specifiers of the vLLM releases in which it is there.
    copies: modules that took the object with `from module import name` and must be given the replacement too.
    """

    module: str
    qualname: str
    releases: str = ">=0.23,<0.34"
    copies: tuple[str, ...] = ()

    def holds(self, release: Version) -> bool:
        return SpecifierSet(self.releases).contains(release, prereleases=True)

    def __str__(self) -> str:
        return f"{self.module}:{self.qualname}"


@dataclass(frozen=True)
class Seam:
    """One intercepted place.

    name: `area.what`, unique. why: which variance it removes. how: what takes its place.
    until: when it can go. close: original -> replacement (imports torch and vLLM only when called).
    causes: numbers of docs/causes.md. required: open means that the engine must not start.
    """

    name: str
    targets: tuple[Target, ...]
    close: Callable[[Any], Any] = field(repr=False)
    why: str
    how: str
    until: str
    platforms: frozenset[str] = ALL_PLATFORMS
    required: bool = True
    causes: tuple[int, ...] = ()

    def target(self, release: Version) -> Target | None:
        """The seam's place in `release`, or None where that release does not have it."""
        return next((t for t in self.targets if t.holds(release)), None)

    @property
    def area(self) -> str:
        return self.name.split(".", 1)[0]


@dataclass(frozen=True)
class Setting:
    """An environment value that vLLM or a library reads: set before either is imported, in every process.

    force: an other value that the user set is an error (True) or is kept (False: a default only).
    """

    name: str
    variable: str
    value: str
    why: str
    platforms: frozenset[str] = ALL_PLATFORMS
    releases: str = ">=0.23,<0.34"
    force: bool = True

    @property
    def area(self) -> str:
        return self.name.split(".", 1)[0]


@dataclass(frozen=True)
class Policy:
    """A rule on the finished engine configuration (`vllm.config.VllmConfig`).

    apply: config -> None. It refuses by raising UnsupportedFeature, or sets a field where a safe value exists.
    Runs in every process that builds a VllmConfig, and once more before the first request.
    """

    name: str
    apply: Callable[[Any], None] = field(repr=False)
    why: str
    platforms: frozenset[str] = ALL_PLATFORMS
    releases: str = ">=0.23,<0.34"

    @property
    def area(self) -> str:
        return self.name.split(".", 1)[0]
