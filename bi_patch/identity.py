"""The identity of this bi_patch: a digest of the sources that serve, the bundled kernels' included.

A version number does not tell two working copies apart, and what a compile cache holds depends on every line.
"""

import functools
import hashlib
import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parent
_ENDINGS = (".py", ".cpp", ".cu", ".h", ".json")
# What decides a bit, or whether a process may serve. tools/ proves and never serves; patches/ is made from the seams.
_SERVING = ("arming", "seams", "ops", "kernels")


@functools.cache
def digest() -> str:
    """sha256 (hex) over path and content of every file that serves: the same wherever the same code is installed."""
    return _digest(_ROOT)


def _digest(root: Path) -> str:
    files = []
    # A source tree holds the kernels behind a link, an installation in a folder.
    for serving in _SERVING:
        for folder, inner, names in os.walk(root / serving, followlinks=True):
            inner[:] = [name for name in inner if name != "__pycache__"]
            files += [Path(folder, name) for name in names if name.endswith(_ENDINGS)]
    made = hashlib.sha256()
    for name, file in sorted((file.relative_to(root).as_posix(), file) for file in files):
        content = file.read_bytes()
        made.update(f"{name} {len(content)}\n".encode())
        made.update(content)
    return made.hexdigest()
