"""The start-up check: before the first token, every required seam of this process is closed, or the check raises.

vLLM's plugin loader runs the check in every process. The engine and each worker run it once more (startup_seams.py), so
that no list of plugins can switch it off.
"""

import importlib
import os
import sys
from dataclasses import dataclass
from typing import Any

import bi_patch_entry
from bi_patch.arming import process
from bi_patch.arming.ledger import Entry, names_of
from bi_patch.errors import SeamOpen, SettingError
from bi_patch.seams import active, anchors
from bi_patch.seams.plan import Planned

CLOSED, OPEN = "closed", "open"


@dataclass(frozen=True)
class Finding:
    """What the check found for one seam or environment variable.

    status: CLOSED or OPEN. reason: why it is open, else "". The other fields come from the declaration.
    """

    name: str
    area: str
    target: str
    status: str
    reason: str
    required: bool
    why: str
    how: str


def inspect(*, load: bool = True, large: bool = True) -> list[Finding]:
    """A finding for every seam and variable of this process's plan. Empty if the process is not armed.

    load: first import the modules that hold seams, so that no seam is open only because its module is not loaded.
    large: also the modules of seams that close on import (Seam.on_import). Without it, such a seam counts as closed
    until its module is loaded.
    """
    current = process.state()
    if current is None:
        return []
    findings = []
    for planned in current.plan.seams:
        status, reason = _look(current, planned, load, large)
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
    """Raise SeamOpen with every required seam that is open, or AnchorMoved if vLLM's source is not the recorded source.

    Does nothing if the environment does not ask for batch invariance, or with BI_PATCH=0.
    """
    current = process.state()
    if current is None:
        if bi_patch_entry.asked_for():
            raise SeamOpen(
                f"{process.SWITCH}=1 asks for batch invariance, but bi_patch is not armed in this process "
                f"({os.getpid()}). Import bi_patch before vllm, start the program with `bi-patch run -- ...`, "
                "or set BI_PATCH=0 to use vLLM's own mode"
            )
        return
    findings = inspect(large=False)
    open_seams = [f for f in findings if f.status == OPEN and f.required]
    if open_seams and not current.settings.allow_open:
        lines = "\n".join(f"  {f.name} at {f.target}: {f.reason}" for f in open_seams)
        raise SeamOpen(
            "bi_patch cannot promise batch invariance. The number of required patch points that are open is "
            f"{len(open_seams)}:\n{lines}\nRun `bi-patch status` to see all open patch points, or set BI_PATCH=0 to "
            "run vLLM without bi_patch"
        )
    anchors.check_installed(current.plan, current.installed.folder.parent, current.settings.cache)


def check_platform() -> None:
    """Raise SettingError if vLLM runs on another platform than that of this process's plan."""
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
            f"bi_patch closed the patch points for {current.plan.platform}, but vLLM runs on "
            f"{current_platform.device_type} ({type(current_platform).__name__}). Unset BI_PATCH_PLATFORM, or set "
            "BI_PATCH=0"
        )


def check_worker(config: Any) -> None:
    """In a worker, before its model loads: apply the policies once more and check. config: the engine's VllmConfig."""
    active.apply_policies(config)
    check()
    check_platform()


def _look(current: process.State, planned: Planned, load: bool, large: bool) -> tuple[str, str]:
    target = planned.target
    if current.settings.leaves_open(planned.seam.name):
        return OPEN, "BI_PATCH_LEAVE_OPEN leaves it open"
    if not large and planned.seam.on_import and target.module not in sys.modules:
        return CLOSED, "as soon as its module is loaded"
    if load:
        try:
            importlib.import_module(target.module)
        except ImportError as error:
            if planned.seam.on_import and _lacks_package(error, target.module):
                return CLOSED, f"as soon as its module is loaded, which needs a package: {error}"
            return OPEN, f"{target.module} cannot be imported: {error}"
    entries = current.ledger.of(planned.seam.name)
    if not entries:
        return OPEN, f"{target.module} is not loaded" if not load else "its module was loaded without bi_patch"
    changed = [e for e in entries if not e.is_closed()]
    if changed:
        return OPEN, f"something else replaced {changed[0].attribute} after bi_patch"
    missed = _missed_copy(planned, entries[0])
    return (OPEN, missed) if missed else (CLOSED, "")


def _lacks_package(error: ImportError, module: str) -> bool:
    """Whether a module cannot be loaded in this environment, because another package is not installed."""
    own = module.partition(".")[0]
    return isinstance(error, ModuleNotFoundError) and (error.name or own).partition(".")[0] != own


def _missed_copy(planned: Planned, entry: Entry) -> str:
    """Why a loaded module of Target.copies would not call the replacement, or ""."""
    for name in planned.target.copies:
        module = sys.modules.get(name)
        if stock := names_of(entry.original, module):
            return f"{name} still holds the original, as {stock[0]}"
        if module is not None and not names_of(entry.replacement, module):
            return f"{name} holds no copy of the replacement, because something else took its place"
    return ""
