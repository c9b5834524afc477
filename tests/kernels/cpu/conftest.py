"""Loads the CPU kernels once for the tests of this folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="session")
def isa(cache_dir):
    """The ISA that this process runs."""
    from bi_patch.kernels.cpu import load

    return load(cache_dir)


@pytest.fixture(scope="session")
def ops(isa):
    return torch.ops.bi_cpu


@pytest.fixture(autouse=True)
def threads():
    """One thread unless the test sets more; put back after it.

    Most tests make thousands of tiny calls, where a team of threads only waits.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def child(cache_dir):
    """Runs Python code in a child with `load`ed kernels; returns what it prints."""

    def run(code: str, isa: str | None = None, defines: tuple[str, ...] = (), **env: str) -> str:
        head = (
            "from pathlib import Path; import torch; from bi_patch.kernels.cpu import load; "
            f"isa = load(Path({str(cache_dir)!r}), {isa!r}, {defines!r}); ops = torch.ops.bi_cpu\n"
        )
        out = subprocess.run(
            [sys.executable, "-c", head + code], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env}
        )
        assert out.returncode == 0, out.stderr[-3000:]
        return out.stdout

    return run
