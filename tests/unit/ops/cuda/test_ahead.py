"""Kernels are compiled by threads before their launch, in the forms that are launched, and errors cost nothing."""

import importlib.util
import threading

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from bi_patch.ops.cuda.ahead import Ahead


class Driver:
    """A Hopper GPU that compiles and never launches."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def compiled(monkeypatch, tmp_path):
    """The compiled kernels so far, each as (name, whether a thread compiled it)."""
    if not hasattr(triton, "AsyncCompileMode"):
        pytest.skip("this Triton cannot compile in threads")
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    found = []

    def listen(src, **_):
        found.append((src.name, threading.current_thread() is not threading.main_thread()))

    monkeypatch.setattr(triton.knobs.compilation, "listener", listen)
    return found


def kernels():
    @triton.jit
    def double(x, rows, WIDE: tl.constexpr):
        at = tl.program_id(0) * rows + tl.arange(0, WIDE)
        tl.store(x + at, 2 * tl.load(x + at))

    @triton.jit
    def wrong(x, rows, WIDE: tl.constexpr):
        tl.static_assert(rows == 7, "never")
        tl.store(x + tl.arange(0, WIDE), rows)

    return double, wrong


def cached(function):
    return [kernel for kernels, *_ in function.device_caches.values() for kernel in kernels.values()]


X = torch.empty(64, device="meta")


def test_every_form_of_a_call_is_compiled_in_a_thread_and_found_later(compiled):
    double, _ = kernels()
    ahead = Ahead()

    def call():
        for rows in (1, 16, 17, 18):  # three forms
            double[(rows,)](X, rows, WIDE=64)

    ahead.rehearse(call)
    ahead.rehearse(lambda: double[(1,)](X, 16, WIDE=32))
    ahead.rehearse(call)
    ahead.finish()
    assert compiled == [("double", True)] * 4
    assert len(cached(double)) == 4 and all(type(kernel).__name__ == "CompiledKernel" for kernel in cached(double))
    for rows in (1, 32, 33):
        double.warmup(X, rows, WIDE=64, grid=(1,))
    assert len(compiled) == 4


def test_what_a_thread_cannot_compile_the_launch_tries_again(compiled):
    double, wrong = kernels()
    ahead = Ahead()
    ahead.rehearse(lambda: (wrong[(1,)](X, 1, WIDE=64), double[(1,)](X, 1, WIDE=64)))
    ahead.rehearse(lambda: 1 / 0)
    ahead.finish()
    assert not cached(wrong) and len(cached(double)) == 1
    for _ in range(2):
        with pytest.raises(triton.CompilationError):
            wrong.warmup(X, 1, WIDE=64, grid=(1,))


def test_only_a_rehearsed_call_does_not_launch(compiled):
    launch, tuned = JITFunction.run, Autotuner.run
    double, _ = kernels()
    ahead, other = Ahead(), []

    def elsewhere():
        try:
            double[(1,)](X, 1, WIDE=64)  # Driver cannot launch
        except Exception as error:
            other.append(error)

    def call():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        triton.autotune([triton.Config({"WIDE": 64})], [])(double)[(1,)](X, 1)

    ahead.rehearse(call)
    assert other and compiled == [("double", True)]  # by the thread's own launch
    ahead.finish()
    assert (JITFunction.run, Autotuner.run) == (launch, tuned)
    ahead.finish()


def test_calls_of_two_threads_leave_tritons_launch_as_it_was(compiled):
    """The first thread begins first and ends first, while the other still rehearses."""
    held, tuned = JITFunction.run, Autotuner.run
    double, _ = kernels()
    begun, ended = threading.Event(), threading.Event()

    def late():
        begun.set()
        assert ended.wait(60)
        double[(1,)](X, 1, WIDE=64)

    batches = Ahead(), Ahead()
    other = threading.Thread(target=batches[1].rehearse, args=(late,))

    def early():
        other.start()
        assert begun.wait(60)

    batches[0].rehearse(early)
    ended.set()
    other.join()
    for ahead in batches:
        ahead.finish()
    assert compiled == [("double", True)]
    assert (JITFunction.run, Autotuner.run) == (held, tuned)
    with pytest.raises(Exception):  # noqa: B017  a launch again, and Driver cannot launch
        double[(1,)](X, 1, WIDE=64)


def test_a_triton_that_cannot_compile_in_threads_compiles_at_the_launch(compiled, monkeypatch):
    monkeypatch.delattr(triton, "AsyncCompileMode")
    ahead, called = Ahead(), []
    ahead.rehearse(lambda: called.append(1))
    ahead.work(lambda: called.append(2) or 1 / 0)
    ahead.finish()
    assert called == [2] and not compiled
