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
    """What this process has armed.

    Fields to read: `armed` (always True), `plan.release` (vLLM's release, a packaging Version), `plan.platform` (cpu,
    cuda or ascend), `closed` and `open` (numbers of patch points). The other fields are internal.

    A patch point is one place in vLLM that bi_patch replaces. It closes when vLLM loads the module that holds it, so
    before vLLM is loaded every patch point is open. The start-up check stops an engine whose patch points do not close.
    """

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

    @property
    def closed(self) -> int:
        """The number of patch points that are closed in this process."""
        return len(self.ledger.seams())

    @property
    def open(self) -> int:
        """The number of patch points that are not closed in this process: vLLM has not loaded their modules yet, or
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
    """What this process has armed, or None: it was never armed, it was disarmed, BI_PATCH=0, or there is no vLLM.

    `print(bi_patch.state())` shows one line: vLLM's release, the platform, and how many patch points are closed. The
    fields to read are described at `State`. The answer is about this process only, not about vLLM's workers.
    """
    return _state


def enter(new: State) -> None:
    """Make `new` the state of this process."""
    global _state
    _state = new


def leave() -> None:
    """This process is disarmed: it has no state from here on."""
    global _state, _was_disarmed
    _state, _was_disarmed = None, True


def was_disarmed() -> bool:
    """Whether this process was armed, and disarmed since."""
    return _was_disarmed and _state is None


def asked_for() -> bool:
    """Whether the environment asks for batch invariance from bi_patch."""
    return os.environ.get(SWITCH, "0") == "1" and os.environ.get("BI_PATCH", "1") != "0"
