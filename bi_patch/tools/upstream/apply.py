"""Applies and reverses patches with `git apply`, and makes a patched copy of the installed vLLM."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bi_patch import installed
from bi_patch.errors import PatchError
from bi_patch.platforms.releases import PACKAGES
from bi_patch.seams import anchors
from bi_patch.tools.upstream import series


def apply(folder: Path, patch: Path, *, reverse: bool = False) -> None:
    """Apply one patch to the tree in `folder` (which holds `vllm/`), or reverse the patch: wholly or not at all.

    Raises PatchError with git's message.
    """
    folder = folder.resolve()
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # Inside another repository, git would skip paths that are not the repository's. The user's git configuration
    # (whitespace, line ends) must not change what git writes.
    environ |= {
        "GIT_CEILING_DIRECTORIES": str(folder.parent),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "LC_ALL": "C",
    }
    command = ["git", "-c", "core.autocrlf=false", "apply", "-p1", "--whitespace=nowarn"]
    command += ["--reverse"] if reverse else []
    try:
        result = subprocess.run(
            [*command, str(patch.resolve())],
            cwd=folder,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise PatchError("`git` is not on PATH; patches are applied with `git apply`") from error
    if result.returncode:
        does = "reverse" if reverse else "apply"
        raise PatchError(f"{patch.name} does not {does}: {result.stderr.strip()}")


def apply_series(folder: Path, patches: Sequence[Path]) -> None:
    """Apply patches in order. When a patch fails, reverse the patches before it and raise PatchError with its name."""
    done: list[Path] = []
    try:
        for patch in patches:
            apply(folder, patch)
            done.append(patch)
    except PatchError:
        reverse_series(folder, done)
        raise


def reverse_series(folder: Path, patches: Sequence[Path]) -> None:
    """Reverse patches, beginning with the last. Raises PatchError."""
    for patch in reversed(patches):
        apply(folder, patch, reverse=True)


def patched_copy(folder: Path) -> Path:
    """Make a patched copy of the installed vLLM, and of vLLM-Ascend if installed, in `folder`.

    The copy is small: it links to every file and folder that no patch changes. A process runs the patched vLLM with
    `folder` first on PYTHONPATH, BI_PATCH_FORM=patches and VLLM_BATCH_INVARIANT=1. It still reads versions from the
    installed distribution.

    Returns `folder`. Raises PatchError when no vLLM is installed, `folder` holds a vLLM, or a patch fails.
    """
    found = installed.find("cpu")  # any platform: a series serves all platforms
    if found is None:
        raise PatchError("no vLLM is installed in this environment: there is nothing to copy")
    release = str(found.release)
    packages = {"vllm": found.folder, **_plugins(release)}
    for package, original in packages.items():
        if (folder / original.name).exists():
            raise PatchError(f"{folder / original.name} exists already: give an empty folder")
        patches = series.read(anchors.folder_of(release, package))
        _mirror(original, folder / original.name, {original.parent / patch.target for patch in patches})
        apply_series(folder, [patch.path for patch in patches])
    return folder


def _plugins(release: str) -> dict[str, Path]:
    """The folders of vLLM's installed plugins that hold seams in this release."""
    found = {}
    for package, (_, releases) in PACKAGES.items():
        spec = importlib.util.find_spec(package) if package != "vllm" and release in releases else None
        for place in (spec and spec.submodule_search_locations) or ():
            found.setdefault(package, Path(place))
    return found


def _mirror(original: Path, copy: Path, changed: set[Path]) -> None:
    """Make a folder with copies of the `changed` files and links to all other files and folders.

    Links to bytecode of unchanged modules, too, which Python would compile again for the copy.
    """
    copy.mkdir(parents=True)
    (copy / "__pycache__").mkdir()
    for bytecode in original.glob("__pycache__/*.pyc"):
        if original / f"{bytecode.name.partition('.')[0]}.py" not in changed:
            (copy / "__pycache__" / bytecode.name).symlink_to(bytecode.resolve())
    for entry in original.iterdir():
        if entry.name == "__pycache__":
            continue
        if entry in changed:
            shutil.copy2(entry, copy / entry.name)
        elif entry.is_dir() and any(entry in file.parents for file in changed):
            _mirror(entry, copy / entry.name, changed)
        else:
            (copy / entry.name).symlink_to(entry.resolve())
