"""Compiles Triton kernels side by side, before certificates launch them. It changes when a kernel is compiled, no bit.

A start that makes certificates launches tens of kernels for the first time, and Triton compiles each at its first
launch, one after the other. Here calls are rehearsed first: a rehearsed call runs as it is, except that each launch of
a Triton kernel only hands the kernel to compiling threads. So exactly the forms are compiled that the same call
launches later, which then finds them ready.

Nothing depends on it. After any error, and with a Triton that cannot compile in threads, the launch itself compiles.
"""

from __future__ import annotations

import contextvars
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

_log = logging.getLogger("vllm.bi_patch")
_THREADS = 16


class Ahead:
    """One batch of kernels. Call `rehearse` any number of times, then `finish`; other code may run in between."""

    def __init__(self) -> None:
        self._functions: dict[int, Any] = {}  # the kernels that were launched, by identity
        self._pool: ThreadPoolExecutor | None = None
        # Triton compiles in threads where its mode is active. The mode is active in this context only, so that kernels
        # that other code launches meanwhile are compiled as usual.
        self._context = contextvars.copy_context()
        self._mode: Any = None

    def rehearse(self, call: Callable[[], object]) -> None:
        """Run `call`; its kernels are compiled, not launched. What the call computes is undefined.

        The caller makes sure that no result of a kernel is used as an index. An error ends the call, and goes no
        further.
        """
        try:
            if self._mode is None:
                self._start()
            self._context.run(self._run, call)
        except Exception:
            _log.debug("bi_patch: kernels are not all compiled ahead", exc_info=True)

    def work(self, call: Callable[[], object]) -> None:
        """Run `call` in a thread meanwhile. An error ends it, and goes no further."""
        self._threads().submit(call)

    def finish(self) -> None:
        """Wait for the threads. After this, a kernel that a thread could not compile looks as if nobody had tried."""
        if self._pool is None:
            return
        try:
            if self._mode is not None:
                self._context.run(self._mode.__exit__, None, None, None)
        except Exception:
            _log.debug("bi_patch: a kernel was not compiled ahead", exc_info=True)
        self._pool.shutdown()
        self._pool = self._mode = None
        for function in self._functions.values():
            _forget_unfinished(function)
        self._functions.clear()

    def _start(self) -> None:
        import triton

        mode = triton.AsyncCompileMode(self._threads(), ignore_errors=True)
        self._context.run(mode.__enter__)
        self._mode = mode

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "bi_patch-compile")
        return self._pool

    def _run(self, call: Callable[[], object]) -> None:
        with _compiling_only(self._functions):
            call()


_rehearsing = threading.local()  # .seen: the kernels of the call that this thread rehearses
_lock = threading.Lock()
_users = 0  # how many calls are rehearsed, in all threads
_originals: tuple[Callable, Callable] | None = None  # while calls are rehearsed: Triton's launch and its tuner's


@contextmanager
def _compiling_only(seen: dict[int, Any]) -> Iterator[None]:
    """In this thread, launches of Triton kernels compile only, and tuners do nothing. seen: gets the kernels.

    The first of several threads replaces Triton's functions, and the last puts them back.
    """
    global _users
    outer = getattr(_rehearsing, "seen", None)
    with _lock:
        if not _users:
            _replace()
        _users += 1
    _rehearsing.seen = seen
    try:
        yield
    finally:
        _rehearsing.seen = outer
        with _lock:
            _users -= 1
            if not _users:
                _put_back()


def _replace() -> None:
    global _originals
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    launch, tuned = _originals = JITFunction.run, Autotuner.run

    def run(self, *args, grid, warmup, **kwargs):
        seen = getattr(_rehearsing, "seen", None)
        if seen is not None:
            seen[id(self)], warmup = self, True
        return launch(self, *args, grid=grid, warmup=warmup, **kwargs)

    def run_tuned(self, *args, **kwargs):
        # A tuner times launches, and nothing is launched here.
        return None if getattr(_rehearsing, "seen", None) is not None else tuned(self, *args, **kwargs)

    JITFunction.run, Autotuner.run = run, run_tuned


def _put_back() -> None:
    global _originals
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    (JITFunction.run, Autotuner.run), _originals = _originals, None


def _forget_unfinished(function: Any) -> None:
    """Take kernels out of a Triton function's caches that are still promised: a launch would wait for them."""
    try:
        for kernels, *_ in function.device_caches.values():
            for key, kernel in list(kernels.items()):
                if type(kernel).__name__ == "FutureKernel" and kernel.kernel is None:
                    del kernels[key]
    except Exception:
        _log.debug("bi_patch: caches of %s are of another form", function, exc_info=True)
