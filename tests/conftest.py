"""What all tests share: a clean environment for child processes, and one cache folder for the run."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import bi_patch_entry

bi_patch_entry.without_arming()


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


@pytest.fixture(scope="session", autouse=True)
def _interrupts():
    """A shell's background jobs ignore SIGINT, and their children too; some tests send it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run_python(cache: Path):
    """Run a Python snippet in a real process; returns the finished process with text output.

    Settings of bi_patch and vLLM's switch are removed first; `environ` adds what the test wants.
    """

    def run(
        code: str, *arguments: str, timeout: float = 120, python: str = sys.executable, **environ: str
    ) -> subprocess.CompletedProcess:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))}
        return subprocess.run(
            [python, *arguments, "-c", code],
            env=clean | {"BI_PATCH_CACHE": str(cache)} | environ,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def answer():
    """A small answer to compare others with."""
    from bi_patch.tools.verify.answers import Answer

    return Answer(
        tokens=[5, 6, 7],
        logprobs=[-0.5, -1.5, -2.5],
        top=[[(5, -0.5), (9, -0.75)], [(6, -1.5)], [(7, -2.5)]],
        prompt_logprobs=[-3.0, -4.0],
        prompt_top=[[(1, -3.0)], [(2, -4.0)]],
        text=" the cat sat",
    )


@pytest.fixture(scope="session")
def arithmetic():
    """Arithmetic(leak=False, **options): an engine made of arithmetic, see there."""
    import msgspec

    from bi_patch.tools.verify import probes
    from bi_patch.tools.verify.answers import Answer
    from bi_patch.tools.verify.engine import Info, Options
    from bi_patch.tools.verify.precision import Precision

    class Arithmetic:
        """An engine whose answers are a function of the request; `leak` lets the batch reach the logprobs."""

        def __init__(self, leak=False, **options):
            self.options = Options("none", max_model_len=4096, **options)
            self.info = Info("armed", "0.32.0", "2.13.0+cpu", "CPU", 2, 16, 500)
            self.leak = leak
            self.cached = 0
            self.closed = False
            self.warm = set()

        def generate(self, requests):
            return [self._answer(r, len(requests) if self.leak else 0) for r in requests]

        def _answer(self, request, batch):
            key = request.prompt[:16]
            self.cached += 16 * (key in self.warm)
            self.warm.add(key)
            ids = [*request.prompt, *range(request.max_tokens)]
            if request.prompt_logprobs is None:
                scored = []
            else:
                scored = [-float(i + 1) for i in range(1, len(request.prompt))]
            made = [-float(len(request.prompt) + i + 1) - batch * 1e-3 for i in range(request.max_tokens)]
            return Answer(ids[len(request.prompt) :], made, [[] for _ in made], scored, [[] for _ in scored])

        def reset_cache(self):
            self.warm.clear()

        def set_chunk(self, tokens):
            self.chunk = tokens

        def ask(self, do, data):
            assert do == "precision"
            return msgspec.msgpack.encode(Precision(1, 1, 0.5, []))

        def alive(self):
            return True

        def counters(self):
            return {probes.HITS: float(self.cached), probes.PREEMPTIONS: 0.0}

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.closed = True

    return Arithmetic
