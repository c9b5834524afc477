"""Reads a release of vLLM or of a plugin as text: from a wheel (or another zip), a tree, or the installed package."""

import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from bi_patch import installed
from bi_patch.errors import PatchError
from bi_patch.platforms.releases import PACKAGES

PACKAGE = "vllm"
_METADATA = {
    "vllm": re.compile(r"vllm(_cpu)?-[^/]+\.dist-info/METADATA"),
    "vllm_ascend": re.compile(r"vllm_ascend-[^/]+\.dist-info/METADATA"),
}
_METADATA_LINE = re.compile(r"^Version:\s*(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """One release of a package as text.

    label: the name that the user gave. release: the public version, e.g. `0.32.0`. files: every .py file of the
    package, relative to the folder that holds the package, e.g. `vllm/config/vllm.py`. read: maps such a name to bytes.
    """

    label: str
    release: str
    files: frozenset[str]
    read: Callable[[str], bytes]
    package: str = PACKAGE

    @property
    def name(self) -> str:
        return name_of(self.package)


def name_of(package: str) -> str:
    """The name of a package for readers: vLLM, or the plugin's distribution."""
    return "vLLM" if package == PACKAGE else PACKAGES[package][0]


def open_source(name: str, release: str | None = None) -> Source:
    """Open a source. name: `installed`, a wheel or zip, or a folder that holds `vllm/`.

    release: overrides the release that the source states, for a tree between two releases or without a stated release.
    Raises PatchError when the source does not exist, holds no vLLM, or states no release.
    """
    if release is not None:
        release = release_number(release)
    if name == "installed":
        found = installed.find("cpu")  # any platform: a series serves all platforms
        if found is None:
            raise PatchError("no vLLM is installed in this environment: name a wheel or a source tree, or use --all")
        return _tree(found.folder.parent, "installed", release or str(found.release))
    path = Path(name)
    if path.is_dir():
        return _tree(path, name, release)
    if path.is_file():
        return _zip(path, name, release)
    raise PatchError(f"{name!r} is neither a wheel, nor a folder that holds {PACKAGE}/, nor the word `installed`")


def release_number(text: str) -> str:
    """The public part of a version: `0.32.0` for `0.32.0+cpu`. Raises PatchError for a text that is no version."""
    try:
        return Version(text).public
    except InvalidVersion as error:
        raise PatchError(f"{text!r} is not a release number such as 0.32.0") from error


def _tree(folder: Path, label: str, release: str | None) -> Source:
    package = next((name for name in PACKAGES if (folder / name / "__init__.py").is_file()), None)
    if package is None:
        raise PatchError(
            f"{folder} holds no {PACKAGE}/__init__.py: name the folder that holds the package {' or '.join(PACKAGES)}"
        )
    files = frozenset(p.relative_to(folder).as_posix() for p in (folder / package).rglob("*.py"))
    beside = [p.relative_to(folder).as_posix() for p in folder.glob("vllm*.dist-info/METADATA")]

    def read(file: str) -> bytes:
        return (folder / file).read_bytes()

    return Source(label, release or _stated(label, package, files, beside, read), files, read, package)


def _zip(path: Path, label: str, release: str | None) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise PatchError(f"{path} is not a wheel: {error}") from error
    names = archive.namelist()
    package = next((name for name in PACKAGES if f"{name}/__init__.py" in names), None)
    if package is None:
        raise PatchError(f"{path} holds no {PACKAGE}/__init__.py: it is not a wheel of vLLM or of a plugin")
    files = frozenset(n for n in names if n.startswith(f"{package}/") and n.endswith(".py"))
    release = release or _stated(label, package, files, names, archive.read)
    return Source(label, release, files, archive.read, package)


def _stated(label: str, package: str, files: frozenset[str], others: list[str], read: Callable[[str], bytes]) -> str:
    """The release that a source states in its _version.py, or in a distribution's metadata."""
    patterns = [(n, _METADATA_LINE) for n in others if _METADATA[package].fullmatch(n)]
    if f"{package}/_version.py" in files:
        patterns.insert(0, (f"{package}/_version.py", installed.VERSION_LINE))
    for name, pattern in patterns:
        if match := pattern.search(read(name).decode(errors="replace")):
            return release_number(match.group(1))
    raise PatchError(f"{label} does not state its vLLM release (no _version.py, no metadata): add --release X.Y.Z")
