"""Runs scripts in a process with the real torch_npu over stub CANN libraries; skipped outside `make
test-ascend`'s environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB = Path(sys.prefix) / "stub-cann"
SOURCES = Path(sys.prefix) / "sources"


@pytest.fixture(scope="session")
def on_npu():
    """Run a script of this folder (or code, with -c) there; returns the finished process.

    sources: vLLM 0.23 and its plugin can be imported. first: folders before them. environ adds to the environment.
    """
    if not STUB.is_dir():
        pytest.skip("no stub CANN in this environment: run `make test-ascend`")

    def run(
        *arguments: str, timeout: float = 300, sources: bool = False, first: tuple = (), **environ: str
    ) -> subprocess.CompletedProcess:
        dropped = ("BI_PATCH", "VLLM_", "ASCEND_HOME")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        folders = (
            *first,
            *((SOURCES,) if sources else ()),
            ROOT,
            ROOT / "tests/ascend",
            ROOT / "tests/kernels/ascend",
        )
        clean |= {
            "LD_LIBRARY_PATH": str(STUB),
            "TASK_QUEUE_ENABLE": "0",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            "TRITON_INTERPRET": "1",
            "BI_PATCH": "0",
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "PYTHONWARNINGS": "ignore",
        }
        return subprocess.run(
            [sys.executable, *arguments],
            env=clean | environ,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=ROOT,
        )

    return run
