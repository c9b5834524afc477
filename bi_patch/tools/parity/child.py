"""Starts the process that holds the sampler and the trainer."""

from __future__ import annotations

import msgspec

from bi_patch.tools.parity.plan import LINE, RUNS, Ask, Plan, Run
from bi_patch.tools.verify.child import ChildEngine
from bi_patch.tools.verify.report import Axis


class ParityEngine(ChildEngine):
    """A ChildEngine whose process also holds a trainer."""

    worker = "bi_patch.tools.parity.worker"

    def line(self, name: str, plan: Plan, locate: bool = True) -> Axis:
        """Measure one line. Raises EngineFailed for an error without a name."""
        asked = msgspec.msgpack.encode(Ask(name, plan, locate))
        return msgspec.msgpack.decode(self.ask(LINE, asked), type=Axis)

    def runs(self) -> list[Run]:
        """The runs of GRPO that this process made last."""
        return msgspec.msgpack.decode(self.ask(RUNS, b""), type=list[Run])
