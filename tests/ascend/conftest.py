"""Runs scripts in a child process with the real torch_npu over stub CANN libraries. Outside the environment of `make
test-ascend`, the tests are skipped."""

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
    """on_npu(script, ...): run a script of this folder, or code with -c, on the stub NPU; returns the finished process.

    sources: make vLLM and vLLM-Ascend importable. first: folders that come before them on the path. environ adds
    variables.
    """
    if not STUB.is_dir():
        pytest.skip("no stub CANN in this environment: run `make test-ascend`")

    def run(
        *arguments: str, timeout: float = 900, sources: bool = False, first: tuple = (), **environ: str
    ) -> subprocess.CompletedProcess:
        dropped = ("BI_PATCH", "VLLM_", "ASCEND_HOME")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        folders = (
            *first,
            *((SOURCES,) if sources else ()),
            ROOT / "tests/children",
            ROOT,
            ROOT / "tests/ascend",
            ROOT / "tests/ascend/kernels",
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
