"""Arm child processes: with the installed .pth file, or else with a sitecustomize at the front of PYTHONPATH.

A spawned worker imports vLLM in a fresh interpreter. Python reads .pth files only from site-packages, not from other
folders on PYTHONPATH or sys.path, such as a folder that `pip install --target` made. There, sitecustomize arms the
worker.
"""

import os
import site
import sys
from pathlib import Path

from bi_patch.errors import SettingError

SITE = Path(__file__).resolve().parent / "site"
_STARTUP_FILE = "bi_patch_autoload.pth"


def reads_startup_file() -> bool:
    """Whether a Python interpreter of this environment reads bi_patch's .pth file when it starts."""
    folders = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])
    return not sys.flags.no_site and any((Path(folder) / _STARTUP_FILE).is_file() for folder in folders)


def python_path(present: str) -> str:
    """The PYTHONPATH that arms every Python process with VLLM_BATCH_INVARIANT=1. present: the present PYTHONPATH."""
    package_parent = SITE.parent.parent.parent
    paths = [str(SITE), *filter(None, present.split(os.pathsep))]
    if package_parent.name not in ("site-packages", "dist-packages"):
        paths.insert(1, str(package_parent))  # bi_patch runs from a source tree
    return os.pathsep.join(dict.fromkeys(paths))


def environ() -> dict[str, str]:
    """The variables that this process must set to arm its children. Empty if the .pth file arms them.

    Raises SettingError if neither the .pth file nor PYTHONPATH can arm them.
    """
    if reads_startup_file():
        return {}
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise SettingError(
            "bi_patch is not installed in this environment, and Python runs with -E, -I or -S. vLLM's processes would "
            "not all be armed. Install bi_patch with pip, or start Python without these options"
        )
    return {"PYTHONPATH": python_path(os.environ.get("PYTHONPATH", ""))}
