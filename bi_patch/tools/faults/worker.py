"""The process of an engine child in which faults are planted: verify's worker with the further instrument "plant".

The worker lifts the refusals that its command line names before the engine starts.
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
    """Run verify's worker. From sys.argv[3] on, the command line holds the names of refusals to lift."""
    instruments.register(PLANT, _plant)
    worker.main(prepare=lambda: lifts.lift(sys.argv[3:]))


def _plant(engine: LocalEngine, data: bytes) -> bytes:
    faults.plant(engine, msgspec.msgpack.decode(data, type=list[str]))
    return msgspec.msgpack.encode(faults.planted())
