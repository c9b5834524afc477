"""The Triton kernels in Triton's interpreter on CPU: close to fp64, and a row's bits equal alone and in a batch."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


AREAS = (
    "gemm",
    "heads",
    "scaled gemm",
    "block experts",
    "norm",
    "norm over ranks",
    "layer norm",
    "rope",
    "sum",
    "leaves",
    "pooling",
    "softmax",
    "attention backward",
    "training",
    "lora",
    "expert lora",
    "drafts",
    "e4m3 pages",
)


@pytest.fixture(scope="module")
def lines() -> dict[str, list[str]]:
    """The lines that the interpreter prints, by area."""
    # Triton chooses the interpreter when it is imported, so the kernels run in a child process.
    env = {**os.environ, "PYTHONPATH": str(ROOT), "BI_PATCH": "0", "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("interpreter.py")
    done = subprocess.run([sys.executable, script, *AREAS], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    parts = [part.splitlines() for part in re.split("^area ", done.stdout, flags=re.M)[1:]]
    return {name: found for name, *found in parts}


@pytest.mark.parametrize("area", AREAS)
def test_numerics_and_rows(lines, area):
    assert len(lines[area]) > 10
    assert not [line for line in lines[area] if not line.startswith("ok ")]
