"""The trainer's CUDA operators in Triton's interpreter on CPU, with stand-ins for the libraries' kernels."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_they_agree_with_fp64():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("cuda_operators.py")
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=900)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(lines) == 86
    assert not [line for line in lines if not line.startswith("ok ")]
