"""The gate: before the first token, every required seam of this process is closed and as recorded, or a named error.

vLLM's plugin loader passes it in every process, and the engine and worker pass it once more (seams/engine.py), so
that a plugin list that leaves bi_patch out does not open it.
"""

import importlib
import os
import sys
from dataclasses import dataclass

from bi_patch.arming import switch
from bi_patch.arming.ledger import Entry, names_of
from bi_patch.errors import SeamOpen, SettingError
from bi_patch.seams import SEAMS, anchors
from bi_patch.seams.plan import Planned

CLOSED, OPEN, NOT_NEEDED = "closed", "open", "not needed here"


@dataclass(frozen=True)
class Finding:
    """One line of the status: a seam or setting, its place, and whether it is closed."""

    name: str
    area: str
    target: str
    status: str
    reason: str
    required: bool
    why: str
    how: str


def inspect(*, load: bool = True) -> list[Finding]:
    """The state of every seam and setting of this process's plan; empty when nothing is armed.

    load: import the modules that hold seams first, so that none is left undecided.
    """
    current = switch.state()
    if current is None or current.plan is None:
        return []
    findings = []
    for planned in current.plan.seams:
        status, reason = _look(current, planned, load)
        seam = planned.seam
        findings.append(
            Finding(seam.name, seam.area, str(planned.target), status, reason, seam.required, seam.why, seam.how)
        )
    for setting in current.plan.settings:
        value = os.environ.get(setting.variable)
        closed = value == setting.value or not setting.force
        findings.append(
            Finding(
                setting.name, setting.area, f"environment:{setting.variable}", CLOSED if closed else OPEN,
                "" if closed else f"{setting.variable} is {value!r}, not {setting.value!r}",
                setting.force, setting.why, f"set to {setting.value}",
            )
        )
    return findings


def verify() -> None:
    """Raise SeamOpen, naming every required seam that is open, or AnchorMoved; return when all are closed.

    Does nothing where batch invariance was not asked for, or BI_PATCH=0.
    """
    current = switch.state()
    if current is None:
        if os.environ.get(switch.SWITCH, "0") == "1" and os.environ.get("BI_PATCH", "1") != "0":
            raise SeamOpen(
                f"{switch.SWITCH}=1 asks for batch invariance but bi_patch is not armed in this process "
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
    assert current.plan is not None and current.installed is not None
    anchors.verify_installed(current.plan, current.installed.folder.parent, current.settings.cache)


def verify_platform() -> None:
    """Raise SettingError where vLLM runs on another platform than the one whose seams are closed."""
    from vllm.platforms import current_platform

    current = switch.state()
    if current is None or current.plan is None:
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


def _look(current: switch.State, planned: Planned, load: bool) -> tuple[str, str]:
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


def not_needed() -> list[Finding]:
    """The seams of other platforms and releases, which this process does not close."""
    current = switch.state()
    if current is None or current.plan is None:
        return []
    planned = {p.seam.name for p in current.plan.seams}
    plan = current.plan
    findings = []
    for seam in SEAMS:
        if seam.name in planned:
            continue
        elsewhere = plan.platform not in seam.platforms
        reason = (
            f"for {', '.join(sorted(seam.platforms))} only" if elsewhere else f"vLLM {plan.release} does not have it"
        )
        target = seam.target(plan.release) or seam.targets[0]
        findings.append(
            Finding(seam.name, seam.area, str(target), NOT_NEEDED, reason, seam.required, seam.why, seam.how)
        )
    return findings
