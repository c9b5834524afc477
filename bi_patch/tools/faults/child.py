"""Starts an engine child in which faults can be planted."""

from __future__ import annotations

import msgspec

from bi_patch.tools.faults.worker import PLANT, RANKS
from bi_patch.tools.verify.child import ChildEngine


class FaultyEngine(ChildEngine):
    """A ChildEngine with the method `plant`. Raises what ChildEngine raises."""

    worker = "bi_patch.tools.faults.worker"

    def plant(self, *names: str) -> None:
        """Plant exactly these faults; no names remove all. Raises EngineFailed for a fault that cannot be planted."""
        self.ask(PLANT, msgspec.msgpack.encode(list(names)))

    def plant_over_ranks(self, name: str) -> int:
        """Plant one of faults.ranks.WAYS in every worker; "" removes it. Returns the number of workers."""
        return msgspec.msgpack.decode(self.ask(RANKS, msgspec.msgpack.encode(name)), type=int)
