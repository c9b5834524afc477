"""Planted fault of speculative decoding: draws from another place of a request's stream than those of single steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from bi_patch.tools.faults.base import CPU, Fault
from bi_patch.tools.verify.engine import LocalEngine

AXIS = "speculative decoding"
_CAUSE = 35


@contextlib.contextmanager
def draws_kept(engine: LocalEngine) -> Iterator[None]:
    """The draws of rejected rows stay drawn, so a request's generator is ahead of its tokens."""
    from bi_patch.ops import drafts

    with mock.patch.object(drafts.Streams, "keep", lambda self, counts: None):
        yield


FAULTS = (
    Fault(
        "draws of rejected drafts",
        _CAUSE,
        draws_kept.__doc__,
        AXIS,
        draws_kept,
        (CPU,),
        "sampler",
        seam={"cpu": "sampling.cpu_draw"},
    ),
)
