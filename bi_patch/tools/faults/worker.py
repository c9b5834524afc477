"""The process of an engine child in which faults are planted: verify's worker with further instruments."""

from __future__ import annotations

import msgspec

from bi_patch.tools import faults
from bi_patch.tools.faults import ranks
from bi_patch.tools.verify import instruments, worker
from bi_patch.tools.verify.engine import LocalEngine

PLANT = "plant"
RANKS = "plant over ranks"


def main() -> None:
    """Run verify's worker."""
    instruments.register(PLANT, _plant)
    instruments.register(RANKS, ranks.plant)
    worker.main()


def _plant(engine: LocalEngine, data: bytes) -> bytes:
    faults.plant(engine, msgspec.msgpack.decode(data, type=list[str]))
    return msgspec.msgpack.encode(faults.planted())
