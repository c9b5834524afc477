"""Lifts refusals in an engine child of the tool faults, to show what the refusals prevent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from bi_patch.tools.faults.base import UnknownFault

RECURRENT = "recurrent layers"


def lift(names: Sequence[str]) -> None:
    """Lift these refusals. Call before the armed engine of this process starts. Raises UnknownFault."""
    for name in names:
        if name not in LIFTS:
            raise UnknownFault(f"there is no refusal {name!r} to lift; the refusals are: {', '.join(LIFTS)}")
        LIFTS[name]()


def _recurrent() -> None:
    """Let models with recurrent layers start, although no seam fixes where their chunks begin."""
    _without("hybrid and state-space models")
    from vllm.v1.attention.backends import gdn_attn

    for backend in vars(gdn_attn).values():
        if isinstance(backend, type) and hasattr(backend, "supports_batch_invariance"):
            backend.supports_batch_invariance = classmethod(lambda cls: True)


def _without(*rows: str) -> None:
    """Make this process accept these rows of the feature table."""
    from bi_patch.seams import active, refusals

    plan = active.plan
    if plan is not None:
        lifted = refusals.policy(plan.platform, lifted=rows)
        policies = tuple(lifted if policy.name == lifted.name else policy for policy in plan.policies)
        active.plan = dataclasses.replace(plan, policies=policies)


LIFTS: dict[str, Callable[[], None]] = {RECURRENT: _recurrent}
