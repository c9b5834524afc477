"""The plan and the cache folder of this process. Arming sets both, and seams read them without importing arming."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bi_patch.seams.plan import Plan

plan: Plan | None = None
cache: Path = Path("~/.cache/bi_patch").expanduser()


def apply_policies(config: Any) -> None:
    """Apply every policy of the plan to a finished VllmConfig. Raises UnsupportedFeature with the policy's name."""
    for policy in plan.policies if plan else ():
        policy.apply(config)
