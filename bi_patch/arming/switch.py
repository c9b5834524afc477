"""The switch: arm() plans the seams and hooks the imports of vLLM's modules. disarm() restores every original."""

import os
import sys
from types import ModuleType

import wrapt

from bi_patch import installed
from bi_patch import settings as settings_module
from bi_patch.arming import catalog, children, process
from bi_patch.arming.process import SWITCH, State
from bi_patch.errors import AnchorMoved, ArmedTooLate, SettingError
from bi_patch.seams import active
from bi_patch.seams.plan import Plan, Planned


def arm(*, by_patch: bool = False) -> State | None:
    """Close every patch point of the installed vLLM as its modules load. Calling it again changes nothing.

    by_patch: a patched vLLM module makes the call, so vLLM modules are loading already.
    Returns the state, or None if BI_PATCH=0 or if no vLLM is installed.
    Raises SettingError, UnsupportedRelease, UnsupportedFeature. Raises ArmedTooLate if vLLM modules with patch points
    are loaded, also after disarm(): objects that vLLM made in the meantime would keep stock code.
    """
    if process.state() is not None:
        return process.state()
    read = settings_module.read()
    if not read.enabled:
        return None
    found = installed.find(read.platform)
    if found is None:
        return None
    plan = catalog.plan(found.release, found.platform)
    unknown = read.leave_open - {name for p in plan.seams for name in (p.seam.name, p.seam.area)}
    if unknown:
        raise SettingError(
            f"BI_PATCH_LEAVE_OPEN names patch points that this release does not have: {', '.join(sorted(unknown))}"
        )
    if not by_patch:
        _refuse_late(plan)
    new = State(read, plan, found)
    hooked = read.form == "hooks" and not by_patch  # wrapt would call the hook of a half-loaded module at once
    _set_environ(new, children.environ() if hooked else {})
    process.enter(new)
    active.plan, active.cache = plan, read.cache
    active.allowed, active.unseeded, active.mla = read.allow_code, read.unseeded, read.mla
    active.leaves = read.tp_invariant
    if hooked:
        for name in plan.modules:
            wrapt.register_post_import_hook(_on_import, name)
    return new


def disarm() -> None:
    """Restore every original and every environment variable. From now on vLLM runs stock code.

    arm() works again only while no vLLM module with a patch point is loaded. Otherwise it raises ArmedTooLate.
    """
    current = process.state()
    if current is None:
        return
    current.ledger.restore()  # nothing can remove import hooks: without a state they do nothing
    active.undo_all()
    active.plan, active.allowed, active.leaves, active.mla, active.latent = None, frozenset(), 0, "two", False
    for name, value in current.previous_environ.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    process.leave()


def close_module(module: ModuleType) -> None:
    """Close the seams whose target is in `module`, and give replacements to modules that hold a copy."""
    current = process.state()
    if current is None:
        return
    name = module.__name__
    with current.lock:
        if name not in current.closed_modules:
            current.closed_modules.add(name)
            for planned in current.plan.by_module.get(name, ()):
                if not current.settings.leaves_open(planned.seam.name):
                    _close(current, planned, module)
        _hand_out_copies(current, name)


def _on_import(module: ModuleType) -> None:
    current = process.state()
    if current is not None and current.settings.form == "hooks":
        close_module(module)


def _close(current: State, planned: Planned, module: ModuleType) -> None:
    seam, target = planned.seam, planned.target
    try:
        current.ledger.replace(seam.name, module, target.qualname, seam.close)
    except AttributeError as error:
        raise AnchorMoved(
            f"patch point {seam.name}: {target} is not in vLLM {current.plan.release} ({error}). "
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
    if not late:
        return
    more = f" and {len(late) - 3} more" if len(late) > 3 else ""
    modules = f"loaded: {', '.join(late[:3])}{more}"
    if process.was_disarmed():
        raise ArmedTooLate(
            f"bi_patch was disarmed in this process, which cannot be armed again: vLLM is imported ({modules}), and "
            "objects that vLLM made in the meantime would keep stock code. Start a new process; in a notebook, restart "
            "the kernel"
        )
    raise ArmedTooLate(
        f"bi_patch was armed after vLLM was imported ({modules}). Import bi_patch before vllm, or start the program "
        "with `bi-patch run -- ...`; in a notebook, restart the kernel, then import bi_patch first"
    )


def _set_environ(new: State, further: dict[str, str]) -> None:
    wanted = {SWITCH: "1"} | further
    for item in new.plan.variables:
        present = os.environ.get(item.variable)
        if present is not None and present != item.value:
            if item.force:
                raise SettingError(
                    f"{item.variable}={present} opens the patch point {item.name}: {item.why}. Unset the variable, or "
                    f"set it to {item.value}"
                )
            continue
        wanted[item.variable] = item.value
    for name, value in wanted.items():
        new.previous_environ[name] = os.environ.get(name)
        os.environ[name] = value
