"""Inductor's emulate_precision_casts: compiled code rounds 16-bit results after every operation, as eager code does.

A process has several users of this option: the engine on CPU, and each armed model of a trainer. PyTorch 2.13 keeps the
value of an option by thread, and its default for the process. So a hold changes both: code may be compiled in a thread
that began before the hold.
"""

from __future__ import annotations

import threading
import weakref

_lock = threading.RLock()  # of one thread it may be taken twice: a collection of garbage may end a hold anywhere
_holds: set[int] = set()
_before = _default = False  # what Inductor had before the first hold


class Hold:
    """The option is on while a hold lives and is not released. A copy of a hold, also a deep copy, holds as well."""

    def __init__(self) -> None:
        _take(id(self))
        self._end = weakref.finalize(self, _give, id(self))
        self._end.atexit = False

    def __reduce__(self):
        return (Hold, ()) if self._end.alive else (_released, ())

    def release(self) -> None:
        """End the hold. A second call does nothing."""
        self._end()


def kept() -> bool:
    """Whether code that this thread compiles rounds as the living holds want."""
    from torch._inductor import config

    with _lock:
        return config.emulate_precision_casts or not _holds


def _released() -> Hold:
    made = Hold()
    made.release()
    return made


def _take(key: int) -> None:
    global _before, _default
    from torch._inductor import config

    entry = config._config["emulate_precision_casts"]
    with _lock:
        if not _holds:
            _before, _default = config.emulate_precision_casts, entry.default
        _holds.add(key)
        entry.default = True
        config.emulate_precision_casts = True


def _give(key: int) -> None:
    from torch._inductor import config

    with _lock:
        _holds.discard(key)
        if not _holds:
            config._config["emulate_precision_casts"].default = _default
            config.emulate_precision_casts = _before
