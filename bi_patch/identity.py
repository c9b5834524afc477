"""The identity of this bi_patch: a digest of the sources that serve, with the bundled kernels.

Two working copies can have the same version number. The contents of a compile cache depend on every line.
"""

import functools
import hashlib
import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parent
_ENDINGS = (".py", ".cpp", ".cu", ".h", ".json")
# The code that decides bits, or whether a process may serve. tools/ never serves, and seams generate patches/.
# training/ never serves either: it runs the operators of ops/ and kernels/, which count here. So a change of training/
# leaves compile caches and running samplers as they are, and a trainer still finds out whether its operators are the
# sampler's.
_SERVING = ("arming", "seams", "ops", "kernels")


@functools.cache
def digest() -> str:
    """sha256 (hex) over the path and content of every file that serves. Equal code has the same digest everywhere."""
    return _digest(_ROOT)


def _digest(root: Path) -> str:
    files = []
    # In a source tree, kernels/ is a link. In an installation, it is a folder.
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
