"""Running a level's probes on a system, axis by axis, into a report that holds what was compared whatever happens."""

from __future__ import annotations

import datetime
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import msgspec

from bi_patch.errors import BiPatchError, UnsupportedFeature
from bi_patch.tools import provenance
from bi_patch.tools.verify import levels, precision
from bi_patch.tools.verify.answers import Answer, Request
from bi_patch.tools.verify.case import Case
from bi_patch.tools.verify.child import EngineFailed
from bi_patch.tools.verify.clock import Clock
from bi_patch.tools.verify.engine import SERVER, Engine, Options
from bi_patch.tools.verify.levels import Level
from bi_patch.tools.verify.probes import (
    AXES,
    ONLINE_PROBES,
    Change,
    CrossProbe,
    NotExercised,
    Probe,
    Run,
    Workload,
)
from bi_patch.tools.verify.report import (
    FAILED,
    LEFT_OUT,
    NOT_APPLICABLE,
    NOT_EXERCISED,
    OUT_OF_TIME,
    WAITING,
    Axis,
    Report,
)
from bi_patch.tools.verify.server import ServerEngine
from bi_patch.tools.verify.system import System


class Watcher:
    """What `verify` calls as it goes on: before each start, after each compared pair, and when an axis is done.

    A subclass shows the progress. left: seconds that the rest of the run will take, as far as they can be estimated.
    """

    def starting(self, what: str, left: float) -> None:
        """An engine is about to start, or a server to be asked: words for it."""

    def compared(self, case: Case) -> None:
        """A pair was compared; the case holds both answers with their texts."""

    def measuring(self, axis: Axis, left: float) -> None:
        """An axis begins, or one more pair of it was compared."""

    def settled(self, axis: Axis, left: float) -> None:
        """An axis is done."""


@dataclass
class _Group:
    """Changes that one further engine makes, and the cross probes that are measured on it."""

    changes: dict[str, object]
    fresh: bool
    probes: list[tuple[CrossProbe, Change]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return ", ".join(dict.fromkeys(change.label for _, change in self.probes))

    @property
    def engine(self) -> str:
        return f"engine with {self.label}"


_PRECISION = 10.0  # seconds that the comparison with fp64 is allowed for
_PRECISION_STEP, _PRECISION_SECONDS = "comparison with fp64", 2.0
_ENGINE = "engine"  # the base engine's start
_EAGER = 0.35  # of a compiled engine's start: nothing is compiled or captured
_FRESH = 1.8  # with empty compile caches
_LOCATE, _TRACING = "locate", 8.0  # seconds of tracing and comparing a pair on a small model
INTERRUPTED = "interrupted."  # Report.stopped after an interrupt
# What vLLM's arguments and parts raise where this build does not have a feature.
_LACKING = ("ValidationError", "NotImplementedError")


# (pair, options of the base engine, what starts an engine) -> a Located, or words, or None
Locate = Callable[[Case, Options, Callable[[Options], AbstractContextManager[Engine]]], object]


def verify(
    system: System,
    level: Level,
    *,
    watcher: Watcher | None = None,
    only: Sequence[str] = (),
    clients: int = 256,
    locate: Locate | None = None,
    workload: Callable[[Engine], Workload] | None = None,
) -> Report:
    """Measure the level's axes, or those named in `only` (of any level), and conclude.

    Engine and server errors, an interrupt and errors that nobody foresaw end it early; they are in the report's
    `stopped` (the last with their traceback in `failure`), with all that was compared before. locate: looks for the
    first operation that differs in a pair (see verify.case). workload: makes the prompts from the live engine; by
    default they are random tokens of the level's lengths.
    """
    made = workload or (lambda engine: levels.workload(level, engine, clients))
    return _Verification(system, level, watcher or Watcher(), only, made, locate).run()


class _Verification:
    def __init__(
        self,
        system: System,
        level: Level,
        watcher: Watcher,
        only: Sequence[str],
        workload: Callable[[Engine], Workload],
        locate: Locate | None,
    ) -> None:
        self.system, self.level, self.watcher, self.workload, self.locate = system, level, watcher, workload, locate
        self.only = frozenset(only)
        self.clock = Clock()
        self.limit: float | None = None
        known = [probe.name for probe in AXES]
        wrong = [name for name in only if name not in known]
        if wrong:
            raise NoSuchAxis(f"there is no axis {', '.join(map(repr, wrong))}; the axes are {', '.join(known)}")
        self.axes = {probe.name: Axis(probe.name, probe.about, probe.causes) for probe in AXES}
        self.chosen = [probe for probe in AXES if self._choose(probe, only)]
        self.report = Report(
            system.name,
            system.mode,
            level.name,
            datetime.datetime.now().isoformat(timespec="seconds"),
            list(self.axes.values()),
            logits=system.options.digests,
            provenance=provenance.here(),
        )

    def run(self) -> Report:
        try:
            self._measure()
        except KeyboardInterrupt:
            self._stop(INTERRUPTED)
        except (BiPatchError, OSError) as error:
            self._stop(_sentence(error))
        except Exception as error:
            self.report.failure = traceback.format_exc()
            self._stop(f"an error without a name: {_sentence(error)}")
        if not self.report.stopped and self.report.differing and self.locate is not None:
            self._locate()
        self.report.seconds = round(self.clock.elapsed, 1)
        self.report.conclude()
        return self.report

    def _choose(self, probe: Probe | CrossProbe, only: Sequence[str]) -> bool:
        """Whether the probe is to run; else its axis says why not."""
        alone = isinstance(probe, CrossProbe) or probe.options is not None
        axis = self.axes[probe.name]
        if only and probe.name not in only:
            axis.settle(LEFT_OUT, "not asked for")
        elif alone and not self.system.restarts:
            axis.settle(NOT_APPLICABLE, "needs engines of its own: verify the model where the server runs")
        elif not only and not self.level.holds(probe):
            axis.settle(LEFT_OUT, f"not in {self.level.name}: {levels.beyond(self.level, probe)}")
        else:
            return True
        return False

    def _measure(self) -> None:
        inside = [p for p in self.chosen if isinstance(p, Probe) and p.options is None]
        own = [p for p in self.chosen if isinstance(p, Probe) and p.options is not None]
        cross = [p for p in self.chosen if isinstance(p, CrossProbe)]
        self._expect([*inside, *own], cross)
        what = "starting the engine" if self.system.restarts else "asking the server"
        with self._start(what, _ENGINE, self.system.options) as engine:
            self._describe(engine)
            load = self.workload(engine)
            run = Run(engine, load)
            own = [probe for probe in own if self._applies(probe, engine)]
            cross = [probe for probe in cross if self._applies(probe, engine)]
            for probe in inside:
                if self._applies(probe, engine) and self._has_time(probe):
                    self._collect(probe, lambda probe=probe: probe.cases(run), engine, notes=run.notes)
            if engine.info.platform != SERVER and not self.only:
                self._precision(engine)
            groups, expected = self._groups(cross, engine), {}
            for probe in dict.fromkeys(probe for group in groups for probe, _ in group.probes):
                requests = probe.requests(engine, load)
                expected[probe.name] = (requests, probe.collect(engine, load))
        for probe in own:
            self._own(probe, load)
        for group in groups:
            self._cross(group, load, expected, groups)

    def _precision(self, engine: Engine) -> None:
        """A lower precision in every batch alike shows in no comparison of bits."""
        began = time.monotonic()
        if self.limit is not None and self.clock.elapsed + _PRECISION > self.limit:
            self.report.precision = precision.none(f"no time left within {self.limit:.0f} s", unchecked=True)
            return
        try:
            self.report.precision = precision.of(engine)
        except BiPatchError as error:
            self.report.precision = precision.none(_sentence(error), unchecked=True)
            if not _goes_on(engine):
                raise
        finally:
            self.clock.finish(_PRECISION_STEP, time.monotonic() - began)

    def _expect(self, probes: Iterable[Probe], cross: Sequence[CrossProbe]) -> None:
        """Before the engine is there: which changes the cross probes make, and what applies, is not known yet."""
        self.clock.expect_start(_ENGINE)
        for probe in (*probes, *cross):
            if self.system.restarts and probe in ONLINE_PROBES:
                continue  # of a server only
            self.clock.expect(probe.name, probe.seconds)
            if isinstance(probe, Probe) and probe.options:
                self.clock.expect_start(probe.name)
        for probe in cross[:1] if self.level.one_engine else cross:
            self.clock.expect_start(probe.name)
        if self.system.restarts and not self.only:
            self.clock.expect(_PRECISION_STEP, _PRECISION_SECONDS)

    def _start(self, what: str, name: str, options: Options, *, fresh: bool = False):
        """name: of the start on the clock."""
        self.watcher.starting(what, self.clock.left())
        began = time.monotonic()
        try:
            engine = self.system.start(options, fresh=fresh)
        except BaseException:
            self.clock.finish_start(name)
            raise
        self.clock.finish_start(name, time.monotonic() - began)
        self.report.starts += self.system.restarts  # a server runs already
        return engine

    def _describe(self, engine: Engine) -> None:
        info, report = engine.info, self.report
        self.limit = self.level.seconds_on(info.platform)
        report.vllm, report.torch, report.device, report.threads = info.vllm, info.torch, info.device, info.threads
        report.open_seams = info.open_seams if report.mode == "armed" else ()
        if isinstance(engine, ServerEngine):
            report.served = engine.said
            return
        options = engine.options
        report.options = {name: getattr(options, name) for name in options.__struct_fields__ if name != "model"}

    def _applies(self, probe: Probe | CrossProbe, engine: Engine) -> bool:
        why = probe.missing(engine)
        if why:
            self._settle(probe.name, NOT_APPLICABLE, why)
        return not why

    def _has_time(self, probe: Probe) -> bool:
        return self._in_time([probe], probe.seconds * self.clock.pace)

    def _in_time(self, probes: Sequence[Probe | CrossProbe], seconds: float) -> bool:
        """Whether so much more is within the level's limit; else the axes say so. A named one is never dropped."""
        if self.limit is None or self.clock.elapsed + seconds < self.limit or any(p.name in self.only for p in probes):
            return True
        for probe in probes:
            self._settle(
                probe.name,
                OUT_OF_TIME,
                f"no time left within {self.limit:.0f} s: --axis, or {levels.beyond(self.level, probe)}",
            )
        return False

    def _collect(
        self,
        probe: Probe | CrossProbe,
        cases: Callable[[], Iterable[Case]],
        engine: Engine,
        last: bool = True,
        notes: list[str] | None = None,
    ) -> None:
        """Count the cases into the probe's axis. A failure settles it; one that ended the engine goes on up.

        notes: what the probe has to say besides, which is taken from the list.
        """
        axis, began = self.axes[probe.name], time.monotonic()
        before = axis.seconds
        self.watcher.measuring(axis, self.clock.left(probe.name, before))
        state, reason = "", ""
        try:
            for case in cases():
                axis.add(case)
                if case.differs and self.locate is not None:
                    self._expect_location(case)
                self.watcher.compared(case)
                self.watcher.measuring(axis, self.clock.left(probe.name, before + time.monotonic() - began))
        except NotExercised as error:
            state, reason = NOT_EXERCISED, str(error)
        except BiPatchError as error:
            state, reason = FAILED, _sentence(error)
            if not _goes_on(engine):
                raise
        except KeyboardInterrupt:
            state, reason = FAILED, "interrupted"
            raise
        except Exception as error:
            state, reason = FAILED, _sentence(error)
            raise
        finally:
            if notes:
                reason = "; ".join(filter(None, (reason, *notes)))
                notes.clear()
            axis.seconds += round(time.monotonic() - began, 2)
            if last or state:
                self._settle(probe.name, state, reason)

    def _settle(self, name: str, state: str = "", reason: str = "") -> None:
        axis = self.axes[name]
        axis.settle(state, reason)
        self.clock.finish(name, axis.seconds)
        self.clock.finish_start(name)  # of an axis that does not apply
        self.watcher.settled(axis, self.clock.left())

    def _groups(self, cross: Sequence[CrossProbe], engine: Engine) -> list[_Group]:
        """Which engines to start, and what is measured on each: one per set of changes, or one for all."""
        groups: dict[str, _Group] = {}
        for probe in cross:
            changes = probe.changes(engine)
            if self.level.one_engine and probe.name not in self.only:
                more = levels.beyond(self.level, probe)
                # Compiling again would take a small level's whole time: a compiled engine is restarted eager.
                if any(change.fresh != engine.options.eager for change in changes if not change.options):
                    self._settle(probe.name, LEFT_OUT, f"an eager engine takes its place: {more}")
                    continue
                if "eager" in changes[0].options and engine.options.eager:
                    self._settle(probe.name, LEFT_OUT, f"would compile the model: {more}")
                    continue
            if self.level.one_engine:
                changes = changes[:1]
            for change in changes:
                key = "" if self.level.one_engine else repr((sorted(change.options.items()), change.fresh))
                group = groups.setdefault(key, _Group({}, False))
                group.changes |= change.options
                group.fresh |= change.fresh
                group.probes.append((probe, change))
        for probe in cross:
            self.clock.finish_start(probe.name)  # expected before the groups were known
        for group in groups.values():
            self.clock.expect_start(group.engine, self._share(group))
        return list(groups.values())

    def _share(self, group: _Group) -> float:
        """How long the start of the group's engine takes, in first starts."""
        if group.changes.get("eager") and not self.system.options.eager:
            return _EAGER
        return _FRESH if group.fresh else 1.0

    def _own(self, probe: Probe, load: Workload) -> None:
        assert probe.options is not None
        changed, starts = probe.options(self.system.options), self.report.starts
        try:
            with self._start(
                f"starting an engine for {probe.name}", probe.name, self.system.options.but(**changed)
            ) as engine:
                run = Run(engine, load)
                self._collect(
                    probe, lambda: (_within(case, changed) for case in probe.cases(run)), engine, notes=run.notes
                )
        except BiPatchError as error:
            self._could_not([probe], error, started=self.report.starts > starts)

    def _cross(
        self,
        group: _Group,
        load: Workload,
        expected: dict[str, tuple[list[Request], list[Answer]]],
        groups: Sequence[_Group],
    ) -> None:
        waiting = [probe for probe, _ in group.probes]
        if not self._in_time(waiting, self.clock.start(self._share(group))):
            self.clock.finish_start(group.engine)
            return
        starts = self.report.starts
        later = {p.name for other in groups[groups.index(group) + 1 :] for p, _ in other.probes}
        options = self.system.options.but(**group.changes)
        try:
            with self._start(f"starting an {group.engine}", group.engine, options, fresh=group.fresh) as engine:
                for probe, change in group.probes:
                    whole = Change(group.label, group.changes, group.fresh)
                    requests, known = expected[probe.name]

                    def cases(probe=probe, change=change, whole=whole, requests=requests, known=known):
                        # Preemption's check reads its own counters; the pair records everything that was changed.
                        got = probe.collect(engine, load, change)
                        return probe.cases(whole, requests, known, got)

                    self._collect(probe, cases, engine, last=probe.name not in later)
                    waiting.remove(probe)
        except BiPatchError as error:
            self._could_not(waiting, error, started=self.report.starts > starts)

    def _could_not(self, probes: Sequence[Probe | CrossProbe], error: BiPatchError, *, started: bool) -> None:
        """An engine for these probes did not start, or died once it had started."""
        lacking = isinstance(error, EngineFailed) and error.kind in _LACKING
        for probe in probes:
            if isinstance(error, UnsupportedFeature):
                self._settle(probe.name, NOT_APPLICABLE, f"refused by the {self.system.mode} engine: {error}")
            elif probe.optional and lacking and not started:
                self._settle(probe.name, NOT_APPLICABLE, f"this engine does not start with it: {_sentence(error)}")
            else:
                self._settle(probe.name, FAILED, _sentence(error))

    def _stop(self, why: str) -> None:
        self.report.stopped = why
        for axis in self.axes.values():
            if axis.state == WAITING and axis.compared:
                axis.settle(FAILED, why)

    def _expect_location(self, case: Case) -> None:
        """Locate comes at the end, on engines of its own that run eagerly."""
        engines = 1 if case.on_one_engine else 2
        self.clock.expect_start(_LOCATE, engines * (1.0 if self.system.options.eager else _EAGER))
        self.clock.expect(_LOCATE, _TRACING)

    def _locate(self) -> None:
        """Look for the first operation that differs, for the first axis that does; where it cannot, say why."""
        axis = next(axis for axis in self.report.axes if axis.case is not None)
        assert self.locate is not None and axis.case is not None
        engines = "one engine" if axis.case.on_one_engine else "two engines"
        self._expect_location(axis.case)
        self.watcher.starting(f"starting {engines} to find the operation behind {axis.name}", self.clock.left())
        try:
            found = self.locate(axis.case, self.system.options, self.system.start)
        except KeyboardInterrupt:
            found = "interrupted before it was found"
        except Exception as error:
            found = f"could not be looked for: {_sentence(error)}"
            if not isinstance(error, (BiPatchError, OSError)):
                self.report.failure = traceback.format_exc()
        words = found.words() if hasattr(found, "words") else found or "the pair did not differ again"
        for shown in axis.shown:
            if shown.label == axis.case.label:
                shown.located = words
                break
        else:
            axis.shown[0].located = words


class NoSuchAxis(BiPatchError):
    """An axis was asked for that does not exist."""


def _within(case: Case, changes: dict[str, object]) -> Case:
    """A case of an engine with changed options: both of its scenarios have them."""
    alone, company = (msgspec.structs.replace(side, options=changes) for side in (case.alone, case.company))
    return msgspec.structs.replace(case, alone=alone, company=company)


def _goes_on(engine: Engine) -> bool:
    """Whether an engine that failed once is alive and holds no half-done requests."""
    if not engine.alive():
        return False
    try:
        engine.reset_cache()
    except BiPatchError:
        return False
    return True


def _sentence(error: BaseException) -> str:
    """An error in a line or two: a child's message goes on with the end of its log, whose path comes before."""
    lines = str(error).strip().splitlines()
    if isinstance(error, EngineFailed):
        last = next((i for i, line in enumerate(lines) if "its output is in" in line), len(lines))
        lines = lines[: last + 1]
    return f"{type(error).__name__}: {' '.join(lines)}".removesuffix(": ")
