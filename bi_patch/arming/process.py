"""The state of this process: the switch sets it, and all other code reads it."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bi_patch.arming.ledger import Ledger
from bi_patch.installed import Installed
from bi_patch.seams.plan import Plan
from bi_patch.settings import Settings

if TYPE_CHECKING:
    from bi_patch.arming.sign import Sign

SWITCH = "VLLM_BATCH_INVARIANT"


@dataclass(repr=False)
class State:
    """The state of an armed process.

    Fields to read: `armed` (always True), `plan.release` (vLLM's release, a packaging Version), `plan.platform` (cpu,
    cuda or ascend), `closed` and `open` (numbers of patch points), `engine` (what the engine core says of itself, None
    before it is ready). The other fields are internal.

    A patch point is one place in vLLM that bi_patch replaces. bi_patch closes a patch point when vLLM loads its module,
    so every patch point is open before vLLM is loaded. The start-up check stops an engine with an open patch point.
    """

    settings: Settings
    plan: Plan
    installed: Installed
    ledger: Ledger = field(default_factory=Ledger)
    closed_modules: set[str] = field(default_factory=set)
    previous_environ: dict[str, str | None] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)
    engine: Sign | None = None

    @property
    def armed(self) -> bool:
        return True

    @property
    def closed(self) -> int:
        """The number of patch points that are closed in this process."""
        return len(self.ledger.seams())

    @property
    def open(self) -> int:
        """The number of patch points that are open in this process. Either vLLM has not loaded their modules yet, or
        BI_PATCH_LEAVE_OPEN names them."""
        return len(self.plan.seams) - self.closed

    def __repr__(self) -> str:
        return (
            f"<bi_patch armed: vLLM {self.plan.release} on {self.plan.platform}, {self.closed} of "
            f"{len(self.plan.seams)} patch points closed in process {os.getpid()}>"
        )


_state: State | None = None
_was_disarmed = False


def state() -> State | None:
    """The state of this process, or None if it is not armed: never armed, disarmed, BI_PATCH=0, or no vLLM installed.

    `print(bi_patch.state())` shows one line: vLLM's release, the platform, and the number of closed patch points.
    `State` describes the fields to read. The state says nothing about vLLM's workers, which are other processes.
    """
    return _state


def enter(new: State) -> None:
    """Make `new` the state of this process."""
    global _state
    _state = new


def leave() -> None:
    """Forget the state: this process is disarmed from now on."""
    global _state, _was_disarmed
    _state, _was_disarmed = None, True


def was_disarmed() -> bool:
    """Whether this process was armed and is disarmed now."""
    return _was_disarmed and _state is None
