"""The vLLM releases that bi_patch supports. A release that stands nowhere here is refused.

The newest release of a platform is the upper bound of everything that names a range of releases: ranges in seams have
lower bounds, and upper bounds only where upstream removed something.
"""

from packaging.specifiers import SpecifierSet
from packaging.version import Version

# Per platform, oldest first. A plugin's release has the number of the vLLM release that it extends.
BY_PLATFORM: dict[str, tuple[str, ...]] = {
    "cpu": ("0.32.0", "0.33.0"),
    "cuda": ("0.23.0", "0.26.0", "0.32.0", "0.33.0"),
    "ascend": ("0.23.0",),
}
ALL = tuple(sorted({release for releases in BY_PLATFORM.values() for release in releases}, key=Version))
# The packages that hold seams: the distribution of each, and its releases.
PACKAGES = {"vllm": ("vllm", ALL), "vllm_ascend": ("vllm-ascend", BY_PLATFORM["ascend"])}


def holds(releases: str, release: Version) -> bool:
    """Whether `release` is in a range given as PEP 440 specifiers; "" is every supported release."""
    return SpecifierSet(releases).contains(release, prereleases=True)
