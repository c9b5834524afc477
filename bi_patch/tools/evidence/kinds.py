"""What a result file holds: one struct for each kind, all with the same head."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar, TypeVar

import msgspec

CAUSES = 25  # docs/causes.md


class CostRow(msgspec.Struct):
    """The time of one workload. stock, upstream, armed: medians in `unit`, None where that engine cannot run.

    ratio: the median over repeats of armed / stock, each pair measured back to back. *_range: least and greatest.
    """

    model: str
    workload: str
    unit: str
    stock: float | None
    upstream: float | None
    armed: float | None
    repeats: int
    ratio: float | None = None
    stock_range: tuple[float, float] | None = None
    armed_range: tuple[float, float] | None = None


class InvarianceRow(msgspec.Struct):
    """One axis on one model: positions compared bitwise, how many differ, and words for the first of them."""

    model: str
    axis: str
    compared: int
    differing: int
    first: str = ""


class FaultRow(msgspec.Struct):
    """One planted fault. cause: its number in docs/causes.md. planted: its name. caught: its axis saw the fault.

    named: locate named the module, op and seam where the fault was planted. emulated: re-created outside the kernel
    that has the fault. axis: the probe that had to see the fault. located: what locate said. refused: the engine does
    not start with the feature.
    """

    cause: int
    planted: str
    caught: bool
    named: bool
    axis: str = ""
    emulated: bool = False
    refused: bool = False
    located: str = ""


class Evidence(msgspec.Struct, kw_only=True):
    """The head of every result file: what was measured, and which bi_patch measured it by which command.

    date: the day, YYYY-MM-DD. time: HH:MM:SS, "" in old files. device: its full name. vllm, torch, triton: releases,
    "" where a library is not installed. threads: of torch, on the CPU. bi_patch: its version. commit: git's full hash,
    None where it is unknown. dirty: the sources differed from that commit. digest: identity.digest() of what serves.
    command: the command line. Files from before 2026-11-28 lack bi_patch, commit, digest, command and time.
    """

    kind: ClassVar[str]  # the beginning of the file's name

    device: str
    vllm: str
    torch: str
    date: str
    time: str = ""
    triton: str = ""
    threads: int = 0
    bi_patch: str = ""
    commit: str | None = None
    dirty: bool = False
    digest: str = ""
    command: str = ""
    note: str = ""

    @property
    def platform(self) -> str:
        """The short name of the device, as files and marks have it: "cpu" for a processor with its cores."""
        return "cpu" if re.search(r"\(\d+ cores\)$", self.device) else short_name(self.device)

    @property
    def variant(self) -> str:
        """What tells two tables of one device and release apart, "" for nothing."""
        return ""


class Cost(Evidence, kw_only=True):
    """Time of stock, upstream's mode and armed."""

    kind = "cost"
    rows: list[CostRow] = []


class Invariance(Evidence, kw_only=True):
    """Positions of armed engines, compared bitwise."""

    kind = "invariance"
    rows: list[InvarianceRow] = []


class Parity(Evidence, kw_only=True):
    """Positions of the trainer, compared bitwise with those of the sampler."""

    kind = "parity"
    rows: list[InvarianceRow] = []


class Faults(Evidence, kw_only=True):
    """Planted faults. clean: pairs compared on the same axes without a fault, and how many of them differed.

    dtype: of the engine, "" in old files for the platform's default (float32 on the CPU, bfloat16 on a GPU).
    """

    kind = "faults"
    rows: list[FaultRow] = []
    dtype: str = ""
    clean: tuple[int, int] = (0, 0)

    @property
    def variant(self) -> str:
        if self.dtype == ("float32" if self.platform == "cpu" else "bfloat16"):
            return ""
        return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(self.dtype, self.dtype)


Kind = TypeVar("Kind", bound=Evidence)
KINDS: tuple[type[Evidence], ...] = (Cost, Invariance, Faults, Parity)


def short_name(device: str) -> str:
    """The word of a device's name that tells models apart, e.g. "h100" of "NVIDIA H100 80GB HBM3"."""
    parts = re.findall(r"[a-z0-9]+", device.lower())
    return next((p for p in parts if re.search(r"[a-z]\d", p)), parts[-1] if parts else "device")


def total_differing(rows: Iterable[InvarianceRow]) -> int:
    return sum(row.differing for row in rows)


def faults_caught(rows: Iterable[FaultRow]) -> tuple[int, int]:
    """How many of the CAUSES known causes have faults that were all caught and named; how many are only refused."""
    planted: dict[int, list[FaultRow]] = {}
    refused = set()
    for row in rows:
        if row.refused:
            refused.add(row.cause)
        else:
            planted.setdefault(row.cause, []).append(row)
    caught = sum(all(r.caught and r.named for r in group) for group in planted.values())
    return caught, len(refused - set(planted))
