"""Plants every fault of a platform, one by one, and records what verify finds."""

from __future__ import annotations

import os
import tempfile
import threading
import traceback
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from bi_patch.errors import SettingError
from bi_patch.files import write_json
from bi_patch.tools import evidence
from bi_patch.tools.evidence import FaultRow, Faults
from bi_patch.tools.faults import Fault, catch, engines, every, named
from bi_patch.tools.faults.base import FP8, PACKED, PACKED_EXPERTS
from bi_patch.tools.faults.child import FaultyEngine
from bi_patch.tools.faults.compiled import AXIS, CAUSE, NAME, catch_compiled
from bi_patch.tools.verify import forks
from bi_patch.tools.verify.child import ARMED, PATIENT, ChildEngine
from bi_patch.tools.verify.engine import Info, Options
from bi_patch.tools.verify.probes import AXES, Workload

# On CUDA, faults are planted in model runner V1, which runs the same layers as V2, and in both forms of MLA.
_ENVIRON = {"cpu": {}, "cuda": {"VLLM_USE_V2_MODEL_RUNNER": "0", "BI_PATCH_MLA": "two"}}
PLATFORMS = tuple(_ENVIRON)
# Axes with an engine of their own. Grammars need a tokenizer, and the large model on CUDA has none.
_OTHER = {
    "cpu": (catch.PREEMPTION, catch.UPDATE, catch.POOLED, catch.LORA, catch.SPECULATION, catch.IMAGES),
    "cuda": (catch.PREEMPTION, catch.UPDATE, catch.STRUCTURED, catch.LORA),
}
DTYPES = ("", "bfloat16", "float32", "float16")
Keep = Callable[[Faults], object]
Tell = Callable[[str], None]


def measure(
    platform: str,
    *,
    only: Collection[str] = (),
    dtype: str = "",
    compiled: bool = True,
    at_once: int = 1,
    tell: Tell,
    keep: Keep,
) -> Faults:
    """Plant every fault of this platform, or the faults named in `only`, and return the results.

    dtype: "" for the platform's default (see engines.options). compiled: whether to plant cause 17 with the others,
    which compiles the model. at_once: how many engines run at a time. tell: called with a text for each fault. keep:
    called with the results so far, after each engine.
    Raises UnknownFault for an unknown name, SettingError for a fault of another platform, and the error of an engine
    that fails.
    """
    wanted = [fault for fault in every() if platform in fault.platforms and (not only or fault.name in only)]
    for name in only:
        if name != NAME and named(name) not in wanted:
            raise SettingError(f"the fault {name!r} cannot be planted on {platform}")
    with tempfile.TemporaryDirectory(prefix="bi_patch-faults-") as folder, forks.forking():
        run = _Run(platform, PATIENT | dict(os.environ) | _ENVIRON[platform], folder, tell, keep)
        given = engines.options(platform, folder, dtype)
        return run.planted(given, wanted, at_once, NAME in only or (compiled and not only))


@dataclass(frozen=True)
class _Run:
    """One run. platform: cpu or cuda. environ: the engine children's environment. folder: holds made config.json."""

    platform: str
    environ: dict[str, str]
    folder: str
    tell: Tell
    keep: Keep
    lock: threading.RLock = field(default_factory=threading.RLock)  # of what the engines that run at once share
    made: list[Faults] = field(default_factory=list)  # the results so far: one, as soon as an engine has started

    def planted(self, given: Options, wanted: list[Fault], at_once: int, compiled: bool) -> Faults:
        """Plant the faults of preemption in an engine with few KV blocks, those of other axes of _OTHER in a small
        engine, those of a model in an engine of this model, and all others in the first engine. Engines of the axis
        weight update run last and one by one: vLLM's sleep mode stops where others take memory of the device. compiled:
        plant cause 17, too."""
        steps: list[Callable[[], None]] = [lambda: self._compiled(given)] if compiled else []  # the longest comes first
        last: list[Callable[[], None]] = []
        for model in sorted({fault.model for fault in wanted}):
            of, held = self._of_model(model, given), [fault for fault in wanted if fault.model == model]
            steps += self._in_model(of, [fault for fault in held if fault.axis != catch.UPDATE])
            last += self._in_model(of, [fault for fault in held if fault.axis == catch.UPDATE])
        pool = ThreadPoolExecutor(at_once)
        try:
            for running in [pool.submit(step) for step in steps]:
                running.result()
        finally:
            pool.shutdown(cancel_futures=True)
        for step in last:
            step()
        return self.made[0]

    def _of_model(self, model: str, given: Options) -> Options:
        """The options of the engine for faults of a model; "" for the platform's own."""
        if model == FP8:
            return engines.quantized(given, self.folder)
        if model == PACKED:
            return engines.packed(given, self.folder)
        if model == PACKED_EXPERTS:
            return engines.packed_experts(given, self.folder)
        return engines.of_family(model, self.folder, given.dtype, self.platform) if model else given

    def _in_model(self, given: Options, wanted: list[Fault]) -> list[Callable[[], None]]:
        """The steps that plant the faults of one model, each in one engine. The first step has a second engine for
        the faults of preemption: the first engine tells the size of a block."""
        other = _OTHER[self.platform]
        of = {axis: [fault for fault in wanted if fault.axis == axis] for axis in other}
        first, preempted = [fault for fault in wanted if fault.axis not in other], of.pop(catch.PREEMPTION)

        def begin() -> None:
            block = self._in_engine(given, first)
            if preempted:
                self._in_engine(engines.few_blocks(given, block), preempted)

        steps = [lambda axis=axis: self._in_engine(self._options(axis, given), of[axis]) for axis in of if of[axis]]
        return [begin, *steps] if first or preempted else steps

    def _in_engine(self, given: Options, there: list[Fault]) -> int:
        """Plant these faults in one engine, and add the results. Returns the size of the engine's KV block."""
        with FaultyEngine(ARMED, given, environ=self.environ) as engine:
            self._begin(engine.info, given.dtype)
            load = catch.workload(engine)
            there = [fault for fault in there if not self._left_out(engine, fault)]
            self._add([self._row(engine, fault, load) for fault in there])
            axes = {fault.axis for fault in there} - {catch.PRECISION, catch.RESTART}
            self._add([], self._clean(engine, axes, load))
            return engine.info.block_size

    def _left_out(self, engine: FaultyEngine, fault: Fault) -> bool:
        """Whether the fault's axis does not apply to its engine, such as a prefix cache of MLA on a CPU without AMX."""
        if fault.axis in _OTHER[self.platform]:  # it has an engine that was started for it
            return False
        why = next((probe.missing(engine) for probe in AXES if probe.name == fault.axis), "")
        if why:
            self.tell(f"{fault.cause:2} {fault.name}: left out ({fault.axis}): {why}")
        return bool(why)

    def _begin(self, info: Info, dtype: str) -> None:
        with self.lock:
            if not self.made:
                self.made.append(evidence.new(Faults, info))
                self.made[0].dtype = dtype

    def _add(self, rows: list[FaultRow], clean: tuple[int, int] = (0, 0)) -> None:
        with self.lock:
            found = self.made[0]
            found.rows += rows
            found.clean = (found.clean[0] + clean[0], found.clean[1] + clean[1])
            _sort(found)
            self.keep(found)

    def _options(self, axis: str, given: Options) -> Options:
        """The options of the engine of an axis of _OTHER. `given`: those of the model's first engine."""
        if axis == catch.UPDATE:
            return engines.updated(self.platform, self.folder, given.dtype)
        if axis == catch.STRUCTURED:
            return engines.small()
        if axis == catch.POOLED:
            return engines.pooled(self.folder, given.dtype)
        if axis == catch.IMAGES:
            return engines.images(self.folder, given.dtype)
        if axis == catch.LORA:
            return engines.adapters(given.dtype, self.platform)
        assert axis == catch.SPECULATION
        return engines.speculating(given)

    def _compiled(self, given: Options) -> None:
        """Plant cause 17, and compare the pairs of its axis without the fault."""
        try:
            clean = catch_compiled(
                given, self.environ, self.platform, planted=False, started=lambda info: self._begin(info, given.dtype)
            )
            found = catch_compiled(given, self.environ, self.platform)
        except Exception:  # a failed engine must not cost the results of the others
            self.tell(traceback.format_exc())
            if not self.made:  # not even the eager engine started
                raise
            self._add([FaultRow(CAUSE, NAME, False, False, AXIS)])
            return
        self.tell(f"17 {found.fault}: caught {found.caught}, named {found.right}\n   {found.named}")
        self.tell(f"without a fault: {clean.first or 'no pair differs'}")
        row = FaultRow(found.cause, found.fault, found.caught, found.right, found.axis, located=found.named)
        self._add([row], (clean.compared, int(clean.caught)))

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
    """A line with the counts. Some of the faults, or all of a platform, may have been planted."""
    caught, refusals = evidence.faults_caught(found.rows)
    planted = len({row.cause for row in found.rows if not row.refused})
    return (
        f"{caught} of {planted} planted causes caught and named (there are {evidence.CAUSES}), "
        f"{refusals} more refused by name; "
        f"without a fault {found.clean[1]} of {found.clean[0]} pairs differ"
    )


def write(found: Faults, folder: Path) -> Path:
    """Write the result file and return its path. A file of the same day, device, release and dtype is replaced."""
    path = folder / evidence.file_name(found)
    write_json(path, found)
    return path
