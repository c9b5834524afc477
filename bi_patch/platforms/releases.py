"""The vLLM releases that bi_patch supports. bi_patch refuses every other release.

The newest release of a platform is the upper bound of every range of releases. A range in a seam has an upper bound of
its own only if a later release no longer has, or no longer needs, the target.
"""

from packaging.specifiers import SpecifierSet
from packaging.version import Version

# By platform, oldest first. A release of a plugin has the number of the vLLM release that it extends.
BY_PLATFORM: dict[str, tuple[str, ...]] = {
    "cpu": ("0.32.0", "0.33.0"),
    "cuda": ("0.23.0", "0.26.0", "0.32.0", "0.33.0"),
    "ascend": ("0.23.0",),
}
ALL = tuple(sorted({release for releases in BY_PLATFORM.values() for release in releases}, key=Version))
# The packages that hold seams, with the distribution and the releases of each.
PACKAGES = {"vllm": ("vllm", ALL), "vllm_ascend": ("vllm-ascend", BY_PLATFORM["ascend"])}


def holds(releases: str, release: Version) -> bool:
    """Whether a range of PEP 440 specifiers contains `release`. "" contains every supported release."""
    return SpecifierSet(releases).contains(release, prereleases=True)
