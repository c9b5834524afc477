"""Lets torchvision's wheel for CUDA load beside a CPU build of torch, for `make test-all`. Does nothing where it loads.

The wheel's operators need CUDA's libraries. torchvision goes on without its operators, but then it registers fakes of
them, which stops its import: "operator torchvision::nms does not exist". A fake is of no use without its operator, so
the module that registers them is emptied.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

_STOPS = "operator torchvision::nms does not exist"


def load() -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", "import torchvision"], stderr=subprocess.PIPE, text=True)


found = load()
if found.returncode and _STOPS in found.stderr:
    fakes = Path(find_spec("torchvision").origin).with_name("_meta_registrations.py")
    fakes.write_text("# Emptied: the wheel's operators do not load beside this torch (requirements/images.py).\n")
    found = load()
sys.exit(found.stderr if found.returncode else 0)
