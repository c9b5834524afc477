"""Inductor's emulate_precision_casts: compiled code rounds 16-bit results after every operation, as eager code does.

A process has one such option, and several users: the engine on CPU, and each armed model of a trainer.
"""

from __future__ import annotations

import threading
import weakref

_lock = threading.RLock()  # of one thread it may be taken twice: a collection of garbage may end a hold anywhere
_holds: set[int] = set()
_before = False  # what Inductor had before the first hold


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


def held() -> bool:
    """Whether a hold lives, so that the option must be on."""
    return bool(_holds)


def _released() -> Hold:
    made = Hold()
    made.release()
    return made


def _take(key: int) -> None:
    global _before
    from torch._inductor import config

    with _lock:
        if not _holds:
            _before = config.emulate_precision_casts
        _holds.add(key)
        config.emulate_precision_casts = True


def _give(key: int) -> None:
    from torch._inductor import config

    with _lock:
        _holds.discard(key)
        if not _holds:
            config.emulate_precision_casts = _before
