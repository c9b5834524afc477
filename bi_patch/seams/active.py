"""The plan and the settings of this process that seams read. Arming sets them, so that seams need not import arming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bi_patch.seams.plan import Plan

plan: Plan | None = None
cache: Path = Path("~/.cache/bi_patch").expanduser()
allowed: frozenset[str] = frozenset()  # BI_PATCH_ALLOW_CODE
leaves: int = 0  # BI_PATCH_TP_INVARIANT: the parts of K of row-parallel layers, 0 for one part a rank
unseeded: str = "random"  # BI_PATCH_UNSEEDED, which every request asks for


mla: str = "two"  # BI_PATCH_MLA, which attention of MLA asks for
latent: bool = False  # whether an engine core of this process has a model with MLA
_undo: list[Callable[[], None]] = []


def at_disarm(undo: Callable[[], None]) -> None:
    """Call `undo` when the process is disarmed, for a change that is not the replacement of an object."""
    if undo not in _undo:
        _undo.append(undo)


def undo_all() -> None:
    """Call what `at_disarm` was given, the last first."""
    while _undo:
        _undo.pop()()


def apply_policies(config: Any) -> None:
    """Apply every policy of the plan to a finished VllmConfig. Raises UnsupportedFeature with the policy's name."""
    for policy in plan.policies if plan else ():
        policy.apply(config)
