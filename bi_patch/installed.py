"""Find the installed vLLM without importing it: its folder, release and platform."""

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from bi_patch.errors import UnsupportedRelease
from bi_patch.platforms import detection

# The version in a package's _version.py.
VERSION_LINE = re.compile(r"^__version__\s*=.*?['\"]([^'\"]+)['\"]", re.MULTILINE)


@dataclass(frozen=True)
class Installed:
    """folder: the package's folder. release: its public version. platform: cpu, cuda or ascend. distribution: its name,
    or ""."""

    folder: Path
    release: Version
    platform: str
    distribution: str


def find(platform: str | None = None) -> Installed | None:
    """The installed vLLM, or None if no vLLM is installed.

    platform: the platform that BI_PATCH_PLATFORM forces, or None to detect the platform.
    Raises UnsupportedRelease if vLLM's release is unknown or its build is not an official one, and UnsupportedFeature
    for a platform without patch points.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    distribution, text = _distribution(folder)
    if not text:
        raise UnsupportedRelease(
            f"the vLLM in {folder} states no version: it has no _version.py and no installed distribution. "
            "Install a released vLLM, or set BI_PATCH=0"
        )
    try:
        version = Version(text)
    except InvalidVersion as error:
        raise UnsupportedRelease(
            f"vLLM version {text!r} in {folder} is not a release number. Install a released vLLM, or set BI_PATCH=0"
        ) from error
    platform = platform or detection.detect(distribution, version)
    detection.check_build(version)
    if platform == "ascend":
        detection.check_plugin(version)
    return Installed(folder, Version(version.public), platform, distribution)


def _distribution(folder: Path) -> tuple[str, str]:
    """The distribution's name, and the version as text: from the package's own _version.py, else the distribution's."""
    text = ""
    version_file = folder / "_version.py"
    if version_file.is_file():
        match = VERSION_LINE.search(version_file.read_text())
        text = match.group(1) if match else ""
    for name in detection.DISTRIBUTIONS:
        try:
            stated = importlib.metadata.version(name)
            return name, text or stated
        except importlib.metadata.PackageNotFoundError:
            continue
    return "", text
