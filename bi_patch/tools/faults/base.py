"""Defines a fault, and plants faults in an engine of this process. Planting the next faults removes those before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from bi_patch.errors import BiPatchError
from bi_patch.tools.verify.engine import LocalEngine

CPU, CUDA = "cpu", "cuda"
BOTH = (CPU, CUDA)
FP8, PACKED, PACKED_EXPERTS = "fp8", "packed", "packed experts"
FEW = 4  # up to this number of rows, a library takes its kernel for few rows
RANKS = 4  # a sum of two is the same in any order


class UnknownFault(BiPatchError):
    """The fault does not exist, or the fault is not for this engine's platform."""


@dataclass(frozen=True)
class Fault:
    """A scoped re-creation of one cause.

    cause: the number in docs/causes.md. about: a description of what is planted. plant: engine -> context manager that
    holds the fault. axis: the probe that must find the fault ("precision": the comparison with fp64; "restart": the
    fault is planted only after the first answers). module, op: texts that the located module and op must contain.
    seam: the seam that must be located, by platform; "" for vLLM's own code without a seam. emulated: platforms on
    which the fault re-creates the mechanism outside the kernel that has it, because the platform lacks this kernel.
    model: the family (tools/models/families.py) or the quantized recipe (tools/models/recipes.py) whose layers the
    fault needs, FP8, PACKED or PACKED_EXPERTS for such weights in a model on CUDA, "" for the layers of every model.
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
    model: str = ""


_stack = contextlib.ExitStack()
_planted: list[str] = []


def platform() -> str:
    from vllm.platforms import current_platform

    return "cpu" if current_platform.is_cpu() else "cuda"


def put(engine: LocalEngine, faults: list[Fault]) -> None:
    """Remove the planted faults, then plant these. Raises UnknownFault."""
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
