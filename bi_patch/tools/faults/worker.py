"""The engine child that faults are planted in: verify's worker with one more instrument, "plant".

The refusals named on its command line are lifted before the engine starts.
"""

from __future__ import annotations

import sys

import msgspec

from bi_patch.tools import faults
from bi_patch.tools.faults import lifts
from bi_patch.tools.verify import instruments, worker
from bi_patch.tools.verify.engine import LocalEngine

PLANT = "plant"


def main() -> None:
    """As verify's worker. The command line goes on with the names of refusals to lift."""
    instruments.register(PLANT, _plant)
    worker.main(prepare=lambda: lifts.lift(sys.argv[3:]))


def _plant(engine: LocalEngine, data: bytes) -> bytes:
    faults.plant(engine, msgspec.msgpack.decode(data, type=list[str]))
    return msgspec.msgpack.encode(faults.planted())
