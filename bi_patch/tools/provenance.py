"""Records which bi_patch made a result, and with which command. Result files and verify reports hold this record."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec

import bi_patch
from bi_patch import identity

_PACKAGE = Path(bi_patch.__file__).resolve().parent
_SOURCES = ("bi_patch", "kernels")  # only changes in these folders make the tree dirty, not a new result file


class Provenance(msgspec.Struct, frozen=True):
    """Which bi_patch ran, and how.

    bi_patch: the version. commit: git's full hash of the source tree, None for an installation that records no hash.
    dirty: the package or the kernels differ from the commit. digest: identity.digest(), over everything that serves.
    command: the command line, without the folder of the program.
    """

    bi_patch: str
    commit: str | None
    digest: str
    command: str
    dirty: bool = False

    def words(self) -> str:
        """Version, commit and digest, shortened for people."""
        commit = f"commit {self.commit[:12]}{' with changes' if self.dirty else ''}" if self.commit else "no commit"
        return f"{self.bi_patch}, {commit}, digest {self.digest[:12]}"


def here() -> Provenance:
    """The provenance of what this process measures."""
    commit, dirty = _commit()
    return Provenance(bi_patch.__version__, commit, identity.digest(), _command(sys.argv), dirty)


def _command(argv: list[str]) -> str:
    program, *arguments = argv or [""]
    if program == "-c":  # `python -c` that calls bi_patch_entry.cli
        program = "bi-patch"
    return shlex.join([Path(program).name if Path(program).is_absolute() else program, *arguments])


@functools.cache
def _commit() -> tuple[str | None, bool]:
    """The commit, and whether the sources differ from it."""
    # An environment's folder may lie inside another project's repository: only a tracked package counts.
    if _git("ls-files", "--error-unmatch", f"{_PACKAGE.name}/__init__.py") is None:
        return _installed_from(), False
    return _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", *_SOURCES) != ""


def _git(*arguments: str) -> str | None:
    """What git prints in the folder of the package; None where git fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(_PACKAGE.parent), *arguments], capture_output=True, text=True, timeout=120, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _installed_from() -> str | None:
    """The commit that pip recorded, if pip installed this package from a git repository; else None."""
    try:
        installed = importlib.metadata.distribution("bi_patch")
    except importlib.metadata.PackageNotFoundError:
        return None
    source = installed.read_text("direct_url.json")
    if source is None or Path(str(installed.locate_file(_PACKAGE.name))).resolve() != _PACKAGE:
        return None
    return json.loads(source).get("vcs_info", {}).get("commit_id")
