"""What this process has armed: one state, set by the switch and read by everything else."""

import os
import threading
from dataclasses import dataclass, field

from bi_patch.arming.ledger import Ledger
from bi_patch.installed import Installed
from bi_patch.seams.plan import Plan
from bi_patch.settings import Settings

SWITCH = "VLLM_BATCH_INVARIANT"


@dataclass(repr=False)
class State:
    """What this process has armed: the plan for its vLLM, and every attribute that was replaced."""

    settings: Settings
    plan: Plan
    installed: Installed
    ledger: Ledger = field(default_factory=Ledger)
    closed_modules: set[str] = field(default_factory=set)
    previous_environ: dict[str, str | None] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def armed(self) -> bool:
        return True

    def __repr__(self) -> str:
        return (
            f"<bi_patch armed: vLLM {self.plan.release} on {self.plan.platform}, {len(self.ledger.seams())} of "
            f"{len(self.plan.seams)} seams closed in process {os.getpid()}>"
        )


_state: State | None = None


def state() -> State | None:
    """This process's state, or None where arm() was never called or was undone."""
    return _state


def enter(new: State | None) -> None:
    """Make `new` the state of this process."""
    global _state
    _state = new


def asked_for() -> bool:
    """Whether the environment asks for batch invariance from bi_patch."""
    return os.environ.get(SWITCH, "0") == "1" and os.environ.get("BI_PATCH", "1") != "0"
