"""Planted faults: scoped re-creations of the known causes (docs/causes.md) that verify must find and name.

Only this package's worker (worker.py) plants faults, in an engine child that a test or `bi-patch faults` started. No
environment variable plants a fault.
"""

from __future__ import annotations

from bi_patch.tools.faults.base import Fault, UnknownFault, planted, put
from bi_patch.tools.verify.engine import LocalEngine

__all__ = ["Fault", "UnknownFault", "every", "named", "plant", "planted"]


def every() -> tuple[Fault, ...]:
    """All faults, sorted by the number of their cause."""
    from bi_patch.tools.faults import (
        adapters,
        attention,
        cpu,
        cuda,
        experts,
        images,
        latent,
        packed_experts,
        pooling,
        recurrent,
        requests,
        shared,
        speculation,
        weights,
    )

    on_cuda = (cuda, packed_experts)
    both = (shared, requests, experts, attention, latent, recurrent, weights, pooling, adapters, speculation, images)
    found = tuple(fault for part in (*both, cpu, *on_cuda) for fault in part.FAULTS)
    return tuple(sorted(found, key=lambda fault: (fault.cause, fault.name)))


def named(name: str) -> Fault:
    """The fault of this name. Raises UnknownFault."""
    found = next((fault for fault in every() if fault.name == name), None)
    if found is None:
        raise UnknownFault(f"there is no fault {name!r}; the faults are: {', '.join(f.name for f in every())}")
    return found


def plant(engine: LocalEngine, names: list[str]) -> None:
    """Plant exactly these faults in this process's engine; an empty list removes all faults. Raises UnknownFault."""
    put(engine, [named(name) for name in names])
