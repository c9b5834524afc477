"""The real engine, started few times: many checks per start. Two threads, because one hides variance."""

import os
from contextlib import contextmanager

import pytest

from bi_patch.tools.models import recipes
from bi_patch.tools.verify.child import PATIENT, ChildEngine
from bi_patch.tools.verify.engine import Options


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    patch = pytest.MonkeyPatch()
    patch.setenv("OMP_NUM_THREADS", "2")
    patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    patch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def model(cache):
    """Name -> folder of a model of the demo, made once."""
    return lambda name: str(recipes.path(name, cache=cache))


@pytest.fixture(scope="session")
def start(model):
    """start(mode, model name, environ={}, kind=ChildEngine, **options): a live engine in a child process, in `with`."""

    @contextmanager
    def make(mode: str, name: str, *, environ: dict[str, str] | None = None, kind=ChildEngine, **options: object):
        given = {"max_model_len": 1024, "chunk": 256, **options}
        with kind(mode, Options(model(name), **given), environ=PATIENT | os.environ | (environ or {})) as engine:
            yield engine

    return make
