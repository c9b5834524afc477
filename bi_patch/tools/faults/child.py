"""Starts an engine child in which faults can be planted."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from bi_patch.tools.faults.worker import PLANT
from bi_patch.tools.verify.child import ChildEngine
from bi_patch.tools.verify.engine import Options


class FaultyEngine(ChildEngine):
    """A ChildEngine with the method `plant`.

    lifts: names of refusals (faults.lifts) that this child leaves out, to show what the refusals prevent.
    Raises what ChildEngine raises; EngineFailed for a refusal that does not exist.
    """

    worker = "bi_patch.tools.faults.worker"

    def __init__(
        self,
        mode: str,
        options: Options,
        *,
        environ: dict[str, str] | None = None,
        fresh: bool = False,
        lifts: Sequence[str] = (),
    ) -> None:
        self.arguments = tuple(lifts)
        super().__init__(mode, options, environ=environ, fresh=fresh)

    def plant(self, *names: str) -> None:
        """Plant exactly these faults; no names remove all. Raises EngineFailed for a fault that cannot be planted."""
        self.ask(PLANT, msgspec.msgpack.encode(list(names)))
