"""How arming reaches child processes: by the installed .pth file, else by a sitecustomize first on PYTHONPATH.

A spawned worker imports vLLM in a fresh interpreter. Python reads .pth files in site-packages only, not in a folder on
PYTHONPATH or sys.path, such as one that `pip install --target` made. There the sitecustomize arms the worker.
"""

import os
import site
import sys
from pathlib import Path

from bi_patch.errors import SettingError

SITE = Path(__file__).resolve().parent / "site"
_STARTUP_FILE = "bi_patch_autoload.pth"


def reads_startup_file() -> bool:
    """Whether an interpreter of this environment reads bi_patch's .pth file at its start."""
    folders = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])
    return not sys.flags.no_site and any((Path(folder) / _STARTUP_FILE).is_file() for folder in folders)


def python_path(present: str) -> str:
    """PYTHONPATH that arms every Python process that VLLM_BATCH_INVARIANT=1 reaches. present: what it holds now."""
    package_parent = SITE.parent.parent.parent
    paths = [str(SITE), *filter(None, present.split(os.pathsep))]
    if package_parent.name not in ("site-packages", "dist-packages"):
        paths.insert(1, str(package_parent))  # run from a source tree
    return os.pathsep.join(dict.fromkeys(paths))


def environ() -> dict[str, str]:
    """The variables that this process must set so that its children are armed; empty where the .pth file arms them.

    Raises SettingError where neither can reach them.
    """
    if reads_startup_file():
        return {}
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise SettingError(
            "bi_patch is not installed in this environment, and Python runs with -E, -I or -S, so that vLLM's "
            "processes would not all be armed. Install bi_patch with pip, or start Python without these options"
        )
    return {"PYTHONPATH": python_path(os.environ.get("PYTHONPATH", ""))}
