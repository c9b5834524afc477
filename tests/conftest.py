"""What all tests share: a clean environment for child processes, and one cache folder for the run."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import bi_patch_entry  # noqa: F401  # before bi_patch: importing it then does not arm the test process


@pytest.fixture(scope="session")
def cache() -> Path:
    """One folder for kernels and certificates: what BI_PATCH_CACHE names, else one that the machine keeps.

    Kernels are keyed by their sources and compiler, so a kept folder only saves compiling them again.
    """
    kept = os.environ.get("BI_PATCH_CACHE") or os.path.join(tempfile.gettempdir(), "bi_patch-tests")
    return Path(kept)


@pytest.fixture(scope="session", autouse=True)
def _cache_for_children(cache: Path):
    before = os.environ.get("BI_PATCH_CACHE")
    os.environ["BI_PATCH_CACHE"] = str(cache)
    yield
    if before is None:
        del os.environ["BI_PATCH_CACHE"]
    else:
        os.environ["BI_PATCH_CACHE"] = before


@pytest.fixture
def run_python(cache: Path):
    """Run a Python snippet in a real process; returns the finished process with text output.

    Settings of bi_patch and vLLM's switch are removed first; `environ` adds what the test wants.
    """

    def run(code: str, *arguments: str, timeout: float = 120, **environ: str) -> subprocess.CompletedProcess:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))}
        return subprocess.run(
            [sys.executable, *arguments, "-c", code],
            env=clean | {"BI_PATCH_CACHE": str(cache)} | environ,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def answer():
    """A small answer to compare others with."""
    from bi_patch.verify.answers import Answer

    return Answer(
        tokens=[5, 6, 7],
        logprobs=[-0.5, -1.5, -2.5],
        top=[[(5, -0.5), (9, -0.75)], [(6, -1.5)], [(7, -2.5)]],
        prompt_logprobs=[-3.0, -4.0],
        prompt_top=[[(1, -3.0)], [(2, -4.0)]],
        text=" the cat sat",
    )
