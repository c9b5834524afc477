"""Planting every fault of a platform, one by one, and keeping what verification made of each."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from bi_patch.errors import SettingError, UnsupportedFeature
from bi_patch.files import write_json
from bi_patch.tools import evidence
from bi_patch.tools.evidence import FaultRow, Faults
from bi_patch.tools.faults import Fault, catch, engines, every, named
from bi_patch.tools.faults.child import FaultyEngine
from bi_patch.tools.faults.compiled import AXIS, CAUSE, NAME, catch_compiled
from bi_patch.tools.faults.lifts import RECURRENT
from bi_patch.tools.verify.child import ARMED, PATIENT, ChildEngine
from bi_patch.tools.verify.engine import Options
from bi_patch.tools.verify.probes import Workload

# The tracer's rows are those of model runner V1, which serves the same layers.
_ENVIRON = {"cpu": {}, "cuda": {"VLLM_USE_V2_MODEL_RUNNER": "0"}}
PLATFORMS = tuple(_ENVIRON)
DTYPES = ("", "bfloat16", "float32", "float16")
Keep = Callable[[Faults], object]
Tell = Callable[[str], None]


def measure(
    platform: str,
    *,
    only: Collection[str] = (),
    dtype: str = "",
    compiled: bool = True,
    tell: Tell,
    keep: Keep,
) -> Faults:
    """Every fault of this platform, or those named in `only`, which leaves out causes 17 and 24.

    dtype: "" for the platform's own (see engines.options). compiled: whether cause 17 is planted, which compiles. tell:
    given a line or more for each fault. keep: given what is known so far, after each engine. Raises UnknownFault for a
    name that no fault has, SettingError for a fault of another platform, and what an engine fails with.
    """
    wanted = [fault for fault in every() if platform in fault.platforms and (not only or fault.name in only)]
    for name in only:
        if named(name) not in wanted:
            raise SettingError(f"the fault {name!r} cannot be planted on {platform}")
    with tempfile.TemporaryDirectory(prefix="bi_patch-faults-") as folder:
        run = _Run(platform, PATIENT | dict(os.environ) | _ENVIRON[platform], folder, tell, keep)
        given = engines.options(platform, folder, dtype)
        found = run.planted(given, wanted)
        if not only:
            found.rows.append(run.refused())
            if platform == "cpu":
                found.rows.append(run.lifted())
            if compiled:
                row, clean = run.compiled(given)
                found.rows.append(row)
                found.clean = (found.clean[0] + clean[0], found.clean[1] + clean[1])
            _sort(found)
            keep(found)
    return found


@dataclass(frozen=True)
class _Run:
    """platform: cpu or cuda. environ: of the engine children. folder: where models of a config alone are made."""

    platform: str
    environ: dict[str, str]
    folder: str
    tell: Tell
    keep: Keep

    def planted(self, given: Options, wanted: list[Fault]) -> Faults:
        """Two engines: one for most faults, one with few KV blocks."""
        rows: list[FaultRow] = []
        with FaultyEngine(ARMED, given, environ=self.environ) as engine:
            made = evidence.new(Faults, engine.info)
            made.dtype = given.dtype
            block = engine.info.block_size
            load = catch.workload(engine)
            rows += [self._row(engine, fault, load) for fault in wanted if fault.axis != catch.PREEMPTION]
            axes = {fault.axis for fault in wanted} - {catch.PREEMPTION, catch.PRECISION, catch.RESTART}
            made.rows = list(rows)
            self.keep(made)
            made.clean = pairs, differing = self._clean(engine, axes, load)
            self.keep(made)
        if any(fault.axis == catch.PREEMPTION for fault in wanted):
            with FaultyEngine(ARMED, engines.few_blocks(given, block), environ=self.environ) as engine:
                load = catch.workload(engine)
                rows += [self._row(engine, fault, load) for fault in wanted if fault.axis == catch.PREEMPTION]
                more = self._clean(engine, {catch.PREEMPTION}, load)
                pairs, differing = pairs + more[0], differing + more[1]
        made.rows, made.clean = rows, (pairs, differing)
        _sort(made)
        self.keep(made)
        return made

    def refused(self) -> FaultRow:
        """Cause 24 as it is kept out: a model with recurrent layers must not start."""
        planted, said = "a model with recurrent layers", ""
        try:
            ChildEngine(ARMED, engines.recurrent(self.folder), environ=self.environ).close()
        except UnsupportedFeature as error:
            said = str(error).split(":")[0]
        self.tell(f"24 {planted}: {'refused by ' + said if said else 'NOT REFUSED'}")
        return FaultRow(24, planted, bool(said), bool(said), "start", refused=bool(said), located=said)

    def lifted(self) -> FaultRow:
        """Cause 24 with the refusal lifted: vLLM's own kernel is the fault."""
        given = engines.recurrent(self.folder)
        with FaultyEngine(ARMED, given, environ=self.environ, lifts=(RECURRENT,)) as engine:
            found = catch.catch_recurrent(engine, catch.workload(engine))
        self.tell(f"24 {found.fault}, refusal lifted: caught {found.caught}, named {found.right}\n   {found.named}")
        planted = "recurrent layers, the refusal lifted"
        return FaultRow(24, planted, found.caught, found.right, found.axis, located=found.named)

    def compiled(self, given: Options) -> tuple[FaultRow, tuple[int, int]]:
        """Cause 17, and the pairs of its axis without it: how many, and how many differ."""
        try:
            clean = catch_compiled(given, self.environ, self.platform, planted=False)
            found = catch_compiled(given, self.environ, self.platform)
        except Exception:  # one engine that does not start must not cost the file of the others
            self.tell(traceback.format_exc())
            return FaultRow(CAUSE, NAME, False, False, AXIS), (0, 0)
        self.tell(f"17 {found.fault}: caught {found.caught}, named {found.right}\n   {found.named}")
        self.tell(f"without a fault: {clean.first or 'no pair differs'}")
        row = FaultRow(found.cause, found.fault, found.caught, found.right, found.axis, located=found.named)
        return row, (clean.compared, int(clean.caught))

    def _row(self, engine: FaultyEngine, fault: Fault, load: Workload) -> FaultRow:
        emulated = self.platform in fault.emulated
        try:
            found = catch.catch(engine, fault.name, load)
        except Exception as error:
            if not engine.alive():
                raise
            self.tell(traceback.format_exc())
            row = FaultRow(fault.cause, fault.name, False, False, fault.axis, emulated, located=f"{error}")
        else:
            row = FaultRow(
                fault.cause, fault.name, found.caught, found.right, fault.axis, emulated, located=found.named
            )
        state = (
            "caught and named" if row.caught and row.named else "caught, named wrongly" if row.caught else "NOT CAUGHT"
        )
        located = row.located.replace("\n", "\n   ")
        self.tell(f"{row.cause:2} {row.planted}: {state} ({row.axis})\n   {located}")
        return row

    def _clean(self, engine: ChildEngine, axes: set[str], load: Workload) -> tuple[int, int]:
        pairs = differing = 0
        for axis in sorted(axes):
            for case in catch.cases(engine, axis, load):
                pairs += 1
                differing += case.differs
                if case.differs:
                    self.tell(f"without a fault: {axis}: {case.label}: {case.difference.first}")
        self.tell(f"without a fault: {differing} of {pairs} pairs differ")
        return pairs, differing


def _sort(found: Faults) -> None:
    found.rows.sort(key=lambda row: (row.cause, row.planted))


def all_right(found: Faults) -> bool:
    """Whether every fault was caught and named, and nothing differed without a fault."""
    return all(row.caught and row.named for row in found.rows) and not found.clean[1]


def verdict(found: Faults) -> str:
    """One line of counts."""
    caught, refusals = evidence.faults_caught(found.rows)
    return (
        f"{caught} of {evidence.CAUSES} causes caught and named, {refusals} more refused by name; "
        f"without a fault {found.clean[1]} of {found.clean[0]} pairs differ"
    )


def write(found: Faults, folder: Path) -> Path:
    """The result file of one device, model and dtype, in place of an earlier one of the same day. Returns its path."""
    path = folder / evidence.file_name(found)
    write_json(path, found)
    return path
