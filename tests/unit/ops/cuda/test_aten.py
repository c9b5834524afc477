"""PyTorch's own products and sums: the bundled kernels serve every form. Here they run in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_form_has_one_order():
    script = Path(__file__).parent / "aten_forms.py"
    environ = os.environ | {"TRITON_INTERPRET": "1", "BI_PATCH": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script], capture_output=True, text=True, timeout=900, env=environ
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) > 15 and all(line.startswith("ok ") for line in lines), done.stdout
