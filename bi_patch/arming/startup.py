"""The start-up check: before the first token, every required seam of this process is closed, or a named error.

vLLM's plugin loader runs it in every process, and the engine and each worker run it once more (startup_seams.py), so
that a plugin list that leaves bi_patch out does not switch it off.
"""

import importlib
import os
import sys
from dataclasses import dataclass
from typing import Any

from bi_patch.arming import process
from bi_patch.arming.ledger import Entry, names_of
from bi_patch.errors import SeamOpen, SettingError
from bi_patch.seams import active, anchors
from bi_patch.seams.plan import Planned

CLOSED, OPEN = "closed", "open"


@dataclass(frozen=True)
class Finding:
    """One line of the status: a seam or an environment variable, its place, and whether it is closed."""

    name: str
    area: str
    target: str
    status: str
    reason: str
    required: bool
    why: str
    how: str


def inspect(*, load: bool = True) -> list[Finding]:
    """The state of every seam and variable of this process's plan; empty when nothing is armed.

    load: import the modules that hold seams first, so that none is left undecided.
    """
    current = process.state()
    if current is None:
        return []
    findings = []
    for planned in current.plan.seams:
        status, reason = _look(current, planned, load)
        seam = planned.seam
        findings.append(
            Finding(seam.name, seam.area, str(planned.target), status, reason, seam.required, seam.why, seam.how)
        )
    for item in current.plan.variables:
        value = os.environ.get(item.variable)
        closed = value == item.value or not item.force
        reason = "" if closed else f"{item.variable} is {value!r}, not {item.value!r}"
        target, state = f"environment:{item.variable}", CLOSED if closed else OPEN
        findings.append(
            Finding(item.name, item.area, target, state, reason, item.force, item.why, f"set to {item.value}")
        )
    return findings


def check() -> None:
    """Raise SeamOpen, naming every required seam that is open, or AnchorMoved; return when all are closed.

    Does nothing where batch invariance was not asked for, or BI_PATCH=0.
    """
    current = process.state()
    if current is None:
        if process.asked_for():
            raise SeamOpen(
                f"{process.SWITCH}=1 asks for batch invariance but bi_patch is not armed in this process "
                f"({os.getpid()}): import bi_patch before vllm, or start with `bi-patch run -- ...`, "
                "or set BI_PATCH=0 to use vLLM's own mode"
            )
        return
    findings = inspect()
    open_seams = [f for f in findings if f.status == OPEN and f.required]
    if open_seams and not current.settings.allow_open:
        lines = "\n".join(f"  {f.name} at {f.target}: {f.reason}" for f in open_seams)
        raise SeamOpen(
            f"batch invariance cannot be promised: {len(open_seams)} required seam(s) are open\n{lines}\n"
            "Run `bi-patch status` for all seams, or set BI_PATCH=0 to run without bi_patch"
        )
    anchors.check_installed(current.plan, current.installed.folder.parent, current.settings.cache)


def check_platform() -> None:
    """Raise SettingError where vLLM runs on another platform than the one whose seams are closed."""
    from vllm.platforms import current_platform

    current = process.state()
    if current is None:
        return
    runs = {
        "cpu": current_platform.is_cpu(),
        "cuda": current_platform.is_cuda(),
        "ascend": current_platform.device_type == "npu",
    }
    if not runs[current.plan.platform]:
        raise SettingError(
            f"bi_patch closed the seams of {current.plan.platform}, but vLLM runs on {current_platform.device_type} "
            f"({type(current_platform).__name__}). Unset BI_PATCH_PLATFORM, or set BI_PATCH=0"
        )


def check_worker(config: Any) -> None:
    """In a worker, before its model loads: policies once more, then this check. config: the engine's VllmConfig."""
    active.apply_policies(config)
    check()
    check_platform()


def _look(current: process.State, planned: Planned, load: bool) -> tuple[str, str]:
    target = planned.target
    if current.settings.leaves_open(planned.seam.name):
        return OPEN, "left open by BI_PATCH_LEAVE_OPEN"
    if load:
        try:
            importlib.import_module(target.module)
        except ImportError as error:
            return OPEN, f"{target.module} cannot be imported: {error}"
    entries = current.ledger.of(planned.seam.name)
    if not entries:
        return OPEN, f"{target.module} is not loaded" if not load else "its module was loaded without bi_patch"
    changed = [e for e in entries if not e.is_closed()]
    if changed:
        return OPEN, f"something else replaced {changed[0].attribute} after bi_patch"
    missed = _missed_copy(planned, entries[0])
    return (OPEN, missed) if missed else (CLOSED, "")


def _missed_copy(planned: Planned, entry: Entry) -> str:
    """Why a loaded module of Target.copies would call something else than the replacement, or ""."""
    for name in planned.target.copies:
        module = sys.modules.get(name)
        if stock := names_of(entry.original, module):
            return f"{name} still holds the original, as {stock[0]}"
        if module is not None and not names_of(entry.replacement, module):
            return f"{name} holds no copy of the replacement: something else took its place"
    return ""
