"""Downloads a release of vLLM or a plugin with pip, and keeps its Python files in the cache folder for later runs."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from bi_patch.errors import PatchError
from bi_patch.platforms.releases import PACKAGES
from bi_patch.tools.upstream.sources import PACKAGE, name_of, release_number

# The checking machine need not be able to run vLLM: the Python files of all builds are the same.
_WHEEL = (
    "--no-deps",
    "--only-binary=:all:",
    "--no-cache-dir",
    "--disable-pip-version-check",
    "--quiet",
    "--implementation=cp",
    "--python-version=3.12",
    "--abi=cp312",
    "--abi=abi3",
    "--abi=none",
    "--platform=manylinux_2_31_x86_64",
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux_2_17_x86_64",
    "--platform=manylinux2014_x86_64",
    "--platform=manylinux1_x86_64",
    # vLLM-Ascend's machines
    "--platform=manylinux_2_34_aarch64",
    "--platform=manylinux_2_28_aarch64",
)


def fetch(release: str, cache: Path, package: str = PACKAGE) -> Path:
    """A zip of the Python files and metadata of a package's release: from `cache`, or downloaded once (vLLM: 330 MB).

    Raises PatchError when the release cannot be downloaded.
    """
    release = release_number(release)
    distribution = PACKAGES[package][0]
    kept = cache / "releases" / f"{distribution}-{release}.zip"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):
        if not _usable(kept, package):
            with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
                slim = _slim(_download(package, release, Path(folder)), package, Path(folder) / "slim.zip")
                os.replace(slim, kept)
    return kept


def _download(package: str, release: str, folder: Path) -> Path:
    distribution = PACKAGES[package][0]
    command = [sys.executable, "-m", "pip", "download", *_WHEEL, "--dest", str(folder), f"{distribution}=={release}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob(f"{distribution.replace('-', '_')}-*.whl"))
    if result.returncode or not wheels:
        lines = [x for x in (result.stderr or result.stdout).splitlines() if x.strip() and not x.startswith("WARNING")]
        raise PatchError(
            f"{name_of(package)} {release} could not be downloaded with pip:\n"
            + "\n".join(lines[-4:])
            + "\nName a wheel or a source tree instead: bi-patch check PATH"
        )
    return wheels[0]


def _slim(wheel: Path, package: str, to: Path) -> Path:
    """A copy of `wheel` with Python files and metadata only."""
    with (
        zipfile.ZipFile(wheel) as full,
        zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as slim,
    ):
        for info in full.infolist():
            python = info.filename.startswith(f"{package}/") and info.filename.endswith(".py")
            kept = (".dist-info/METADATA", ".dist-info/entry_points.txt")
            if python or info.filename.endswith(kept):
                slim.writestr(info.filename, full.read(info))
    return to


def _usable(kept: Path, package: str) -> bool:
    """Whether an earlier download is complete."""
    try:
        with zipfile.ZipFile(kept) as archive:
            return f"{package}/__init__.py" in archive.namelist() and archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False
