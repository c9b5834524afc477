"""What a planted fault is, and planting: scoped to one engine in this process, undone when the next set is planted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from bi_patch.errors import BiPatchError
from bi_patch.tools.verify.engine import LocalEngine

CPU, CUDA = "cpu", "cuda"
BOTH = (CPU, CUDA)


class UnknownFault(BiPatchError):
    """A fault that is not in the list, or is not for the platform of this engine."""


@dataclass(frozen=True)
class Fault:
    """A scoped re-creation of one cause.

    cause: number of docs/causes.md. about: what is planted, in words. plant: engine -> context manager in which the
    fault is there. axis: name of the probe that must find it ("precision": the comparison with fp64; "restart": the
    fault is in the second process only). module, op: what the located module and op must contain.
    seam: what must own it, by platform; "" for vLLM's own code without a seam.
    emulated: the mechanism is re-created outside its own kernel, since this platform does not have it.
    """

    name: str
    cause: int
    about: str
    axis: str
    plant: Callable[[LocalEngine], contextlib.AbstractContextManager[None]]
    platforms: tuple[str, ...] = BOTH
    module: str = ""
    op: str = ""
    seam: dict[str, str] | None = None
    emulated: tuple[str, ...] = ()


_stack = contextlib.ExitStack()
_planted: list[str] = []


def platform() -> str:
    from vllm.platforms import current_platform

    return "cpu" if current_platform.is_cpu() else "cuda"


def put(engine: LocalEngine, faults: list[Fault]) -> None:
    """Take out what was planted before, then plant these. Raises UnknownFault."""
    from bi_patch.tools.faults import parts

    _stack.close()
    _planted.clear()
    parts.forget()
    here = platform()
    for fault in faults:
        if here not in fault.platforms:
            raise UnknownFault(f"the fault {fault.name!r} cannot be planted on {here}")
    for fault in faults:
        _stack.enter_context(fault.plant(engine))
        _planted.append(fault.name)


def planted() -> list[str]:
    return list(_planted)
