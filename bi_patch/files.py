"""Small JSON files that several processes read and write: each write replaces the whole file at once. And one name."""

import os
import tempfile
from pathlib import Path
from typing import TypeVar

import msgspec

T = TypeVar("T")
# How the folder's name begins through which training.sync hands over weights. The folder is deleted once they are read.
HANDED_OVER = "bi_patch-sync-"


def read_json(path: Path, kind: type[T]) -> T | None:
    """The file decoded as `kind`, or None if the file is missing, unreadable, or of another form."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError):
        return None


def write_json(path: Path, value: object, *, indent: int = 2) -> None:
    """Write `value` so that a reader sees the whole old file or the whole new file. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(value), indent=indent) + b"\n")
        os.chmod(temporary, 0o644)  # users may share a cache
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
