"""The end of a run at a given time, which keeps the axes of `bi-patch verify` that are complete."""

import contextlib
import math
import signal
import time
from collections.abc import Iterator


@contextlib.contextmanager
def ending(until: int) -> Iterator[None]:
    """Within this context, an interrupt comes at `until`, in seconds since 1970, or in the second after; 0 for none."""

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(max(1, math.ceil(until - time.time())) if until else 0)
    try:
        yield
    finally:
        signal.alarm(0)
