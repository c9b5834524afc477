"""The switch: arming plans the seams and hooks the imports of vLLM's modules; disarming puts every original back."""

import os
import sys
import threading
from dataclasses import dataclass, field
from types import ModuleType

import wrapt

from bi_patch import settings as settings_module
from bi_patch.arming import children, installed
from bi_patch.arming.installed import Installed
from bi_patch.arming.ledger import Ledger
from bi_patch.errors import AnchorMoved, ArmedTooLate, SettingError
from bi_patch.seams import active
from bi_patch.seams import plan as plan_module
from bi_patch.seams.plan import Plan, Planned
from bi_patch.settings import Settings

SWITCH = "VLLM_BATCH_INVARIANT"


@dataclass
class State:
    """What this process has armed. plan is None while nothing is armed."""

    settings: Settings
    plan: Plan | None = None
    installed: Installed | None = None
    ledger: Ledger = field(default_factory=Ledger)
    closed_modules: set[str] = field(default_factory=set)
    previous_environ: dict[str, str | None] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def armed(self) -> bool:
        return self.plan is not None


_state: State | None = None


def state() -> State | None:
    """This process's state, or None where arm() was never called or was undone."""
    return _state


def arm(*, by_patch: bool = False) -> State | None:
    """Close every seam of the installed vLLM as its modules load. Calling it again changes nothing.

    by_patch: called from a patched vLLM module, so vLLM modules are loading already.
    Returns the state, or None when BI_PATCH=0 or no vLLM is installed.
    Raises SettingError, UnsupportedRelease, UnsupportedFeature, ArmedTooLate.
    """
    global _state
    if _state is not None:
        return _state
    read = settings_module.read()
    if not read.enabled:
        return None
    found = installed.find(read.platform)
    if found is None:
        return None
    plan = plan_module.make(found.release, found.platform)
    unknown = read.leave_open - {name for p in plan.seams for name in (p.seam.name, p.seam.area)}
    if unknown:
        raise SettingError(
            f"BI_PATCH_LEAVE_OPEN names seams that this release does not have: {', '.join(sorted(unknown))}"
        )
    if not by_patch:
        _refuse_late(plan)
    new = State(read, plan, found)
    hooked = read.form == "hooks" and not by_patch  # half-loaded modules would call their hook at once
    _set_environ(new, children.environ() if hooked else {})
    _state = new
    active.plan, active.cache = plan, read.cache
    active.checks, active.worker_checks = [_gate], [_workers]
    if hooked:
        for name in plan.modules:
            wrapt.register_post_import_hook(_on_import, name)
    return new


def disarm() -> None:
    """Put every original and every environment value back; import hooks that are left do nothing from here on."""
    global _state
    if _state is None:
        return
    _state.ledger.restore()
    active.plan, active.checks, active.worker_checks = None, [], []
    for name, value in _state.previous_environ.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _state = None


def close_module(module: ModuleType) -> None:
    """Close the seams whose target is in `module`, and hand replacements to modules that hold a copy."""
    current = _state
    if current is None or current.plan is None:
        return
    name = module.__name__
    with current.lock:
        if name not in current.closed_modules:
            current.closed_modules.add(name)
            for planned in current.plan.by_module.get(name, ()):
                if not current.settings.leaves_open(planned.seam.name):
                    _close(current, planned, module)
        _hand_out_copies(current, name)


def _gate(config: object) -> None:
    from bi_patch.arming import gate

    gate.verify()
    gate.verify_platform()


def _workers(executor: object) -> None:
    from bi_patch.arming import workers

    workers.verify(executor)


def _on_import(module: ModuleType) -> None:
    if _state is not None and _state.settings.form == "hooks":
        close_module(module)


def _close(current: State, planned: Planned, module: ModuleType) -> None:
    seam, target = planned.seam, planned.target
    try:
        current.ledger.replace(seam.name, module, target.qualname, seam.close)
    except AttributeError as error:
        raise AnchorMoved(
            f"seam {seam.name}: {target} is not in vLLM {current.plan.release} ({error}). "
            "Run `bi-patch check` to see what upstream changed"
        ) from error


def _hand_out_copies(current: State, name: str) -> None:
    for planned in current.plan.seams:
        copies = planned.target.copies
        if not copies or name not in (planned.target.module, *copies):
            continue
        for entry in current.ledger.of(planned.seam.name)[:1]:
            for copy in copies:
                current.ledger.copy(planned.seam.name, copy, entry)


def _refuse_late(plan: Plan) -> None:
    late = [name for name in plan.modules if name in sys.modules]
    if late:
        raise ArmedTooLate(
            "bi_patch was armed after these vLLM modules were imported: "
            f"{', '.join(late)}. Import bi_patch before vllm, or start the program with `bi-patch run -- ...`"
        )


def _set_environ(new: State, further: dict[str, str]) -> None:
    assert new.plan is not None
    wanted = {SWITCH: "1"} | further
    for setting in new.plan.settings:
        present = os.environ.get(setting.variable)
        if present is not None and present != setting.value:
            if setting.force:
                raise SettingError(
                    f"{setting.variable}={present} opens seam {setting.name}: {setting.why}. "
                    f"Unset it or set it to {setting.value}"
                )
            continue
        wanted[setting.variable] = setting.value
    for name, value in wanted.items():
        new.previous_environ[name] = os.environ.get(name)
        os.environ[name] = value
