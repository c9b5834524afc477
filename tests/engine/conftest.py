"""Fixtures that start the real engine. Tests share a start where they can. Two threads, because one hides variance."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from bi_patch.tools.models import recipes
from bi_patch.tools.verify import wire
from bi_patch.tools.verify.child import ARMED, PATIENT, STOCK, ChildEngine
from bi_patch.tools.verify.engine import Options
from bi_patch.tools.verify.forks import Forks

sys.path.insert(0, str(Path(__file__).parent))  # for unhurried.py


@pytest.fixture(scope="session")
def user_code(tmp_path_factory):
    """A folder from which every child can import. All children have it, so that they are forks of one process."""
    return tmp_path_factory.mktemp("code")


@pytest.fixture(scope="session", autouse=True)
def _environment(_children, user_code):
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join((os.environ["PYTHONPATH"], str(user_code))))
    patch.setenv("OMP_NUM_THREADS", "2")
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    patch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def _forks():
    """Children are forks of processes that have imported vLLM, one for each environment. Faults need environments of
    their own, and armed, stock and compiled engines outlive these."""
    forks = Forks(most=5)

    def launch(argv, *, env, **given):
        # pytest's variable names the running test: with it, every test would import vLLM again.
        return forks.launch(argv, env={k: v for k, v in env.items() if k != "PYTEST_CURRENT_TEST"}, **given)

    patch = pytest.MonkeyPatch()
    patch.setattr(ChildEngine, "launch", staticmethod(launch))
    yield
    patch.undo()
    forks.close()


@pytest.fixture(scope="session")
def model(cache):
    """model(name): the folder of a recipe's model, made once."""
    return lambda name: str(recipes.path(name, cache=cache))


@pytest.fixture(scope="session")
def start(model):
    """start(mode, name, environ=None, kind=ChildEngine, **options): a context manager that gives a live engine of the
    model `name` in a child process."""

    @contextmanager
    def make(mode: str, name: str, *, environ: dict[str, str] | None = None, kind=ChildEngine, **options: object):
        given = {"max_model_len": 1024, "chunk": 256, **options}
        with kind(mode, Options(model(name), **given), environ=PATIENT | os.environ | (environ or {})) as engine:
            yield engine

    return make


START_SECONDS = 900  # of a server; ends what hangs


class Server(NamedTuple):
    """A running server. url: without a path. pid: of the process that starts all others. log: what they print."""

    url: str
    pid: int
    log: Path


def _free_port() -> int:
    """A port that nobody has. It is below those that the kernel gives to others, so it stays free until it is used."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@pytest.fixture(scope="session")
def free_port():
    return _free_port


@pytest.fixture(scope="session")
def serve(cache, tmp_path_factory):
    """serve(folder, *options, **environment): a context manager that gives a Server of a model's folder, started by
    `bi-patch run -- vllm serve` on loopback."""

    @contextmanager
    def make(model: str, *options: str, **environment: str) -> Iterator[Server]:
        log = tmp_path_factory.mktemp("server") / "log"
        port = _free_port()
        bin_folder = Path(sys.executable).parent
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))}
        environ |= {
            "PATH": f"{bin_folder}:{environ['PATH']}",
            "BI_PATCH_CACHE": str(cache),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_WAIT_POLICY": "passive",
            **environment,
        }
        # Last, since vLLM cannot set a process's title where arming has changed the first variable.
        environ["PYTHONPATH"] = environ.pop("PYTHONPATH")
        place = ("--host", "127.0.0.1", "--port", str(port))
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bi-patch", "run", "--", "vllm", "serve", model, *place, *options],
                executable=str(bin_folder / "bi-patch"),
                env=environ,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()[-5000:]
                    assert time.monotonic() < deadline, log.read_text()[-5000:]
                    time.sleep(1)
            yield Server(f"http://127.0.0.1:{port}", process.pid, log)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=300)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    return make


class Refusing(ChildEngine):
    """An armed child that is asked for one engine after the other, all of which it refuses."""

    def _start(self):
        return None

    def refuse(self, options: Options) -> None:
        """Ask for an engine with these options. Raises the child's error."""
        self._ask(wire.Command("start", options=options))


@pytest.fixture(scope="session")
def refusing(start):
    with start(ARMED, recipes.QWEN3, kind=Refusing) as child:
        yield child


@pytest.fixture(scope="module")
def refusing_late(start):
    """As `refusing`, for refusals after vLLM has set up its ranks, which the process's next engine takes over."""
    with start(ARMED, recipes.QWEN3, kind=Refusing) as child:
        yield child


@pytest.fixture(scope="session")
def bf16(start):
    """An armed engine in bf16: chunks of 256 tokens, a prefix cache."""
    with start(ARMED, recipes.QWEN3) as engine:
        yield engine


@pytest.fixture(scope="session")
def fp32(start):
    """An armed engine in fp32: 8 heads of 64, 2 KV heads, KV blocks of 128 tokens, a prefix cache."""
    with start(ARMED, recipes.QWEN3, dtype="float32", max_model_len=2048) as engine:
        yield engine


@pytest.fixture(scope="session")
def stock(start):
    """The stock engine in fp32, where every change of an order shows in the bits."""
    with start(STOCK, recipes.QWEN3, dtype="float32", max_model_len=3200) as engine:
        yield engine
