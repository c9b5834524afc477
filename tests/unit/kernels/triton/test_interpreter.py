"""The Triton kernels in Triton's interpreter on CPU: close to fp64, and a row's bits equal alone and in a batch."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("kernel", ["gemm", "norm", "rope", "sum", "softmax", "attention backward", "training"])
def test_numerics_and_rows(kernel):
    # Triton chooses the interpreter when it is imported, so the kernels run in a child process.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "BI_PATCH": "0", "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("interpreter.py")
    done = subprocess.run([sys.executable, script, kernel], env=env, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(lines) > 10
    assert not [line for line in lines if not line.startswith("ok ")]
