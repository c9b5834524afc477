"""What a result file holds: one struct for each kind of file, all with the same head."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar, TypeVar

import msgspec

CAUSES = 36  # docs/causes.md


class CostRow(msgspec.Struct):
    """The time of one workload.

    stock, upstream, armed: median times in `unit`, None for an engine that cannot run. ratio: the median over repeats
    of armed / stock, each pair measured back to back. stock_range, armed_range: the least and the greatest time.
    parts: as armed, with BI_PATCH_TP_INVARIANT=8.
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
    parts: float | None = None


class InvarianceRow(msgspec.Struct):
    """One axis on one model: positions compared bitwise, how many differ, and a description of the first of them."""

    model: str
    axis: str
    compared: int
    differing: int
    first: str = ""


class FaultRow(msgspec.Struct):
    """One planted fault.

    cause: the number in docs/causes.md. planted: the fault's name. caught: the fault's axis found a difference.
    named: locate named the module, op and seam of the fault. axis: the probe that must find the fault. emulated: the
    fault re-creates the mechanism outside the kernel that has it. located: the description that locate gave. refused:
    the row is about a feature with which the engine refuses to start.
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
    """The head of every result file: what was measured, and which bi_patch measured with which command.

    date: the day, YYYY-MM-DD. time: HH:MM:SS, "" in old files. device: the full name. vllm, torch, triton: releases, ""
    for a library that is not installed. threads: torch's threads on the CPU. bi_patch: the version. commit: git's full
    hash, None for an unknown commit. dirty: the sources differed from the commit. digest: identity.digest() of what
    serves. command: the command line. Files from before 2026-11-28 lack bi_patch, commit, digest, command and time.
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
        """The device's short name in the names of files and marks: for a processor "cpu", with AMX tiles "cpu-amx"."""
        if re.search(r"\(\d+ cores\)$", self.device):
            return "cpu-amx" if ", AMX (" in self.device else "cpu"
        return short_name(self.device)

    @property
    def variant(self) -> str:
        """A text that tells two tables of the same device and release apart, "" for none."""
        return ""


class Cost(Evidence, kw_only=True):
    """Times of stock vLLM, upstream's mode and armed vLLM."""

    kind = "cost"
    rows: list[CostRow] = []


class Invariance(Evidence, kw_only=True):
    """Positions in answers of armed engines, compared bitwise."""

    kind = "invariance"
    rows: list[InvarianceRow] = []


class Parity(Evidence, kw_only=True):
    """Positions of the trainer, compared bitwise with the sampler's."""

    kind = "parity"
    rows: list[InvarianceRow] = []


class Faults(Evidence, kw_only=True):
    """Planted faults.

    clean: pairs compared on the same axes without a fault, and how many of them differed. dtype: the engine's, "" in
    old files.
    """

    kind = "faults"
    rows: list[FaultRow] = []
    dtype: str = ""
    clean: tuple[int, int] = (0, 0)

    @property
    def variant(self) -> str:
        if self.dtype == ("float32" if self.platform.startswith("cpu") else "bfloat16"):
            return ""
        return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(self.dtype, self.dtype)


Kind = TypeVar("Kind", bound=Evidence)
KINDS: tuple[type[Evidence], ...] = (Cost, Invariance, Faults, Parity)


def short_name(device: str) -> str:
    """The word in a device's name that names the model, e.g. "h100" in "NVIDIA H100 80GB HBM3"."""
    parts = re.findall(r"[a-z0-9]+", device.lower())
    return next((p for p in parts if re.search(r"[a-z]\d", p)), parts[-1] if parts else "device")


def total_differing(rows: Iterable[InvarianceRow]) -> int:
    return sum(row.differing for row in rows)


def faults_caught(rows: Iterable[FaultRow]) -> tuple[int, int]:
    """Two counts of causes: causes whose faults were all caught and named, and causes that are only refused."""
    planted: dict[int, list[FaultRow]] = {}
    refused = set()
    for row in rows:
        if row.refused:
            refused.add(row.cause)
        else:
            planted.setdefault(row.cause, []).append(row)
    caught = sum(all(r.caught and r.named for r in group) for group in planted.values())
    return caught, len(refused - set(planted))
