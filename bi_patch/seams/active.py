"""What arming tells the seams of this process: the plan, where to cache, and what to check before the first token.

Seams know nothing of arming; arming fills this in.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bi_patch.seams.plan import Plan

plan: Plan | None = None
cache: Path = Path("~/.cache/bi_patch").expanduser()
# Called in every worker before its model loads, with the engine's VllmConfig.
checks: list[Callable[[Any], None]] = []
# Called in the engine's process once its workers are up, with its executor.
worker_checks: list[Callable[[Any], None]] = []


def apply_policies(config: Any) -> None:
    """Apply every policy of the plan to a finished VllmConfig. Raises UnsupportedFeature, naming the policy."""
    for policy in plan.policies if plan else ():
        policy.apply(config)


def run_checks(config: Any) -> None:
    """Policies once more, then every check that arming registered."""
    apply_policies(config)
    for check in checks:
        check(config)


def check_workers(executor: Any) -> None:
    """Every check of all workers that arming registered."""
    for check in worker_checks:
        check(executor)
