"""Fixtures of all tests: a clean environment for child processes, one cache folder for the run, a fake engine."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import bi_patch_entry

bi_patch_entry.without_arming()

CHILDREN = Path(__file__).parent / "children"


def pytest_collection_finish():
    """Let the garbage collector skip what lives to the end: all tests, and the modules that they import."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _children():
    """Every Python process that a test starts reads children/sitecustomize.py, and keeps bytecode for the next one."""
    patch = pytest.MonkeyPatch()
    patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(CHILDREN), os.environ.get("PYTHONPATH")))))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def cache() -> Path:
    """The folder for kernels and certificates: BI_PATCH_CACHE's, else a fixed folder under the temporary folder.

    A kernel's file name holds a digest of its sources and compiler. So a folder that is kept between runs only saves
    compiling the kernels again.
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
    """Let SIGINT interrupt: a shell's background jobs and their children ignore SIGINT, which some tests send."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def run_python(cache: Path):
    """run_python(code, *arguments, **environ): run code in a child process; returns the finished process.

    The child's environment holds no setting of bi_patch except the cache folder, and no VLLM_BATCH_INVARIANT. `environ`
    adds variables.
    """

    def run(
        code: str, *arguments: str, timeout: float = 900, python: str = sys.executable, **environ: str
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


@pytest.fixture(scope="session")
def cpu_release() -> str:
    """The release of the CPU build of vLLM that is installed, e.g. "0.33.0"."""
    from bi_patch import installed

    return str(installed.find("cpu").release)


@pytest.fixture(scope="session")
def patched(tmp_path_factory) -> Path:
    """A patched copy of the installed vLLM: the first folder on the path of a process that uses the copy."""
    from bi_patch.tools.upstream.apply import patched_copy

    return patched_copy(tmp_path_factory.mktemp("patched"))


@pytest.fixture
def answer():
    """A small answer, for comparisons."""
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
    """Arithmetic(leak=False, **options): the class of a fake engine that computes its answers by arithmetic."""
    import msgspec

    from bi_patch.platforms.releases import BY_PLATFORM
    from bi_patch.tools.verify import probes
    from bi_patch.tools.verify.answers import Answer
    from bi_patch.tools.verify.engine import Info, Options
    from bi_patch.tools.verify.precision import Precision

    class Arithmetic:
        """A fake engine whose answers depend on the request alone; with `leak`, logprobs depend on the batch too."""

        def __init__(self, leak=False, **options):
            self.options = Options("none", max_model_len=4096, **options)
            self.info = Info("armed", BY_PLATFORM["cpu"][-1], "2.13.0+cpu", "CPU", 2, 16, 500)
            self.leak = leak
            self.cached = 0
            self.closed = False
            self.warm = set()

        def generate(self, requests):
            return [self._answer(r, len(requests) if self.leak else 0) for r in requests]

        def _answer(self, request, batch):
            if request.abort:
                return Answer([])
            key = request.prompt[:16]
            self.cached += 16 * (key in self.warm)
            self.warm.add(key)
            count = min([request.max_tokens, *(token + 1 for token in request.stop_tokens)])
            ids = [*request.prompt, *range(count)]
            if request.prompt_logprobs is None:
                scored = []
            else:
                scored = [-float(i + 1) for i in range(1, len(request.prompt))]
            seen = sum(image.seed for image in request.images)
            made = [-float(len(request.prompt) + seen + i + 1) - batch * 1e-3 for i in range(count)]
            tops = [[] for _ in made], [[] for _ in scored]
            seed = (request.seed or 7) if request.temperature else None
            return Answer(ids[len(request.prompt) :], made, tops[0], scored, tops[1], seed=seed)

        def reset_cache(self):
            self.warm.clear()

        def set_chunk(self, tokens):
            self.chunk = tokens

        def set_logprobs(self, mode):
            self.mode = mode

        def ask(self, do, data):
            if do == "pause":
                self.pauses = [*getattr(self, "pauses", []), msgspec.msgpack.decode(data)]
                return b""
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
