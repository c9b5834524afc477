"""Fixtures that start the real engine. Tests share a start where they can. Two threads, because one hides variance."""

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
