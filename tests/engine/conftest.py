"""Fixtures that start the real engine. Tests share a start where they can. Two threads, because one hides variance."""

import os
from contextlib import contextmanager

import pytest

from bi_patch.tools.models import recipes
from bi_patch.tools.verify import wire
from bi_patch.tools.verify.child import ARMED, PATIENT, STOCK, ChildEngine
from bi_patch.tools.verify.engine import Options
from bi_patch.tools.verify.forks import Forks


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "2")
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    patch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def _forks():
    """Children are forks of processes that have imported vLLM, one for each environment."""
    forks = Forks()
    patch = pytest.MonkeyPatch()
    patch.setattr(ChildEngine, "launch", staticmethod(forks.launch))
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


class Refusing(ChildEngine):
    """An armed child that is asked for one engine after the other, all of which it refuses."""

    def _start(self):
        return None

    def refuse(self, options: Options) -> None:
        """Ask for an engine with these options. Raises the child's error."""
        self._ask(wire.Command("start", options=options))


@pytest.fixture(scope="session")
def user_code(tmp_path_factory):
    """A folder from which `refusing` can import."""
    return tmp_path_factory.mktemp("code")


@pytest.fixture(scope="session")
def refusing(start, user_code):
    paths = os.pathsep.join(filter(None, (str(user_code), os.environ.get("PYTHONPATH"))))
    with start(ARMED, recipes.QWEN3, environ={"PYTHONPATH": paths}, kind=Refusing) as child:
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
