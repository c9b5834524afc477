"""Refusals that the planted faults can lift in their own engine child, to show what the refusals keep out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from bi_patch.tools.faults.base import UnknownFault

RECURRENT = "recurrent layers"


def lift(names: Sequence[str]) -> None:
    """Before an armed engine starts in this process. Raises UnknownFault."""
    for name in names:
        if name not in LIFTS:
            raise UnknownFault(f"there is no refusal {name!r} to lift; there are: {', '.join(LIFTS)}")
        LIFTS[name]()


def _recurrent() -> None:
    """Models with recurrent layers start, though no seam fixes where their chunks begin."""
    _without("engine.features", "engine.cuda_features")
    from vllm.v1.attention.backends import gdn_attn

    for backend in vars(gdn_attn).values():
        if isinstance(backend, type) and hasattr(backend, "supports_batch_invariance"):
            backend.supports_batch_invariance = classmethod(lambda cls: True)


def _without(*policies: str) -> None:
    from bi_patch.seams import active

    plan = active.plan
    if plan is not None:
        active.plan = dataclasses.replace(plan, policies=tuple(p for p in plan.policies if p.name not in policies))


LIFTS: dict[str, Callable[[], None]] = {RECURRENT: _recurrent}
