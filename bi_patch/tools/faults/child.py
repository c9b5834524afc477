"""Starts an engine child in which faults can be planted."""

from __future__ import annotations

import msgspec

from bi_patch.tools.faults.worker import PLANT
from bi_patch.tools.verify.child import ChildEngine


class FaultyEngine(ChildEngine):
    """A ChildEngine with the method `plant`. Raises what ChildEngine raises."""

    worker = "bi_patch.tools.faults.worker"

    def plant(self, *names: str) -> None:
        """Plant exactly these faults; no names remove all. Raises EngineFailed for a fault that cannot be planted."""
        self.ask(PLANT, msgspec.msgpack.encode(list(names)))
