"""Runs a level's probes on a system, axis by axis, and makes the report. An error or interrupt loses no result."""

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
from bi_patch.tools.verify import forks, levels, precision
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
from bi_patch.tools.verify.probes.base import unpooled
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
    """Callbacks of `verify`: before each engine start, after each compared pair, and at the end of each axis.

    A subclass shows the progress. left: the estimated seconds that the rest of the run will take.
    """

    def starting(self, what: str, left: float) -> None:
        """Called before an engine starts, or before a server gets its first request. what: a description for users."""

    def compared(self, case: Case) -> None:
        """Called after a pair was compared. The case holds both answers with their texts."""

    def measuring(self, axis: Axis, left: float) -> None:
        """Called when an axis begins, and after each compared pair of the axis."""

    def settled(self, axis: Axis, left: float) -> None:
        """Called when an axis ends."""


@dataclass
class _Group:
    """The options in which one further engine differs from the base engine, and the cross probes that run on it."""

    changes: dict[str, object]
    fresh: bool
    probes: list[tuple[CrossProbe, Change]] = field(default_factory=list)

    @property
    def label(self) -> str:
        return ", ".join(dict.fromkeys(change.label for _, change in self.probes))

    @property
    def engine(self) -> str:
        return f"engine with {self.label}"


_PRECISION = 10.0  # seconds that must be left for the comparison with fp64
_PRECISION_STEP, _PRECISION_SECONDS = "comparison with fp64", 2.0
_ENGINE = "engine"  # the base engine's start
_EAGER = 0.35  # share of a compiled engine's start: an eager engine compiles and captures nothing
_FRESH = 1.8  # share of the first start with empty compile caches
_LOCATE, _TRACING = "locate", 8.0  # seconds of tracing and comparing a pair on a small model
INTERRUPTED = "interrupted."  # Report.stopped after an interrupt
# The errors of vLLM when this build does not have a feature.
_LACKING = ("ValidationError", "NotImplementedError")


# (pair, options of the base engine, function that starts an engine) -> a Located, or a text, or None
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
    """Measure the level's axes, or the axes named in `only` (of any level), and return the report with its verdict.

    An engine or server error, an interrupt or an unexpected error ends the run early. The report's `stopped` names it,
    `failure` holds the traceback of an unexpected error, and everything compared before stays in the report.
    watcher: gets the progress. clients: concurrent requests on the axis of a running server. locate: finds the first
    operation that differs in a pair (see verify.locate). workload: makes the prompts for the live engine; by default,
    random tokens of the level's lengths. Raises NoSuchAxis.
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
        with forks.forking():
            return self._run()

    def _run(self) -> Report:
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
        """Whether the probe runs; otherwise its axis gets the reason."""
        alone = isinstance(probe, CrossProbe) or probe.options is not None
        axis = self.axes[probe.name]
        if only and probe.name not in only:
            axis.settle(LEFT_OUT, "not asked for")
        elif alone and not self.system.restarts:
            axis.settle(NOT_APPLICABLE, "needs other engines: run `bi-patch verify MODEL` on the server's machine")
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
        """Compare products with fp64. No comparison of bits shows a precision that is too low in every batch alike."""
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
        """Tell the clock what is to come, before the engine shows which axes apply and which engines they need."""
        self.clock.expect_start(_ENGINE)
        cross = [probe for probe in cross if not self._compiles_anew(probe)]
        for probe in (*probes, *cross):
            if self.system.restarts and probe in ONLINE_PROBES:
                continue  # these probes need a server
            self.clock.expect(probe.name, probe.seconds)
            if isinstance(probe, Probe) and probe.options:
                self.clock.expect_start(probe.name)
        for probe in cross[:1] if self.level.one_engine else cross:
            self.clock.expect_start(probe.name)
        if self.system.restarts and not self.only:
            self.clock.expect(_PRECISION_STEP, _PRECISION_SECONDS)

    def _compiles_anew(self, probe: CrossProbe) -> bool:
        """Whether the probe would compile the model beside an eager engine, which takes the time of a small level."""
        return probe.compiles and self.level.one_engine and self.system.options.eager and probe.name not in self.only

    def _start(self, what: str, name: str, options: Options, *, fresh: bool = False, axes: Sequence[str] = ()):
        """Start an engine, or connect to the server. name: the name of the start on the clock. axes: the axes for which
        it is started; they share its time."""
        self.watcher.starting(what, self.clock.left())
        began = time.monotonic()
        try:
            engine = self.system.start(options, fresh=fresh)
        except BaseException:
            self.clock.finish_start(name)
            raise
        took = time.monotonic() - began
        self.clock.finish_start(name, took)
        self.report.starting = round(self.report.starting + took, 2)
        for axis in map(self.axes.get, axes):
            axis.starting = round(axis.starting + took / len(axes), 2)
        self.report.starts += self.system.restarts  # a server is not started
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
        why = unpooled(probe, engine) or probe.missing(engine)
        if why:
            self._settle(probe.name, NOT_APPLICABLE, why)
        return not why

    def _has_time(self, probe: Probe) -> bool:
        return self._in_time([probe], probe.seconds * self.clock.pace)

    def _in_time(self, probes: Sequence[Probe | CrossProbe], seconds: float) -> bool:
        """Whether `seconds` more fit into the level's limit; otherwise the probes' axes are out of time.

        Axes that the user named are always measured.
        """
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
        """Add the cases to the probe's axis. A failure settles the axis; a failure that ended the engine is raised.

        notes: the probe's remarks. They become part of the axis's reason, and the list is emptied.
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
        self.clock.finish_start(name)  # an axis that does not apply starts no engine
        self.watcher.settled(axis, self.clock.left())

    def _groups(self, cross: Sequence[CrossProbe], engine: Engine) -> list[_Group]:
        """The engines to start and the probes of each: one engine for each set of changes, or one for all changes."""
        groups: dict[str, _Group] = {}
        for probe in cross:
            changes = probe.changes(engine)
            if self.level.one_engine and probe.name not in self.only:
                more = levels.beyond(self.level, probe)
                # Compiling again would take the whole time of a small level, so its second engine is eager.
                if any(change.fresh != engine.options.eager for change in changes if not change.options):
                    self._settle(probe.name, LEFT_OUT, f"this level restarts eager engines only: {more}")
                    continue
                if self._compiles_anew(probe):
                    self._settle(probe.name, LEFT_OUT, f"this axis compiles the model: {more}")
                    continue
            if self.level.one_engine:
                changes = changes[:1]
            for change in changes:
                key = "" if self.level.one_engine else repr((sorted(change.options.items()), change.fresh))
                key = probe.name if probe.single else key
                group = groups.setdefault(key, _Group({}, False))
                group.changes |= change.options
                group.fresh |= change.fresh
                group.probes.append((probe, change))
        for probe in cross:
            self.clock.finish_start(probe.name)  # replaced by the groups' starts
        for group in groups.values():
            self.clock.expect_start(group.engine, self._share(group))
        return list(groups.values())

    def _share(self, group: _Group) -> float:
        """The time that the group's engine takes to start, as a share of the first start."""
        if group.changes.get("eager") and not self.system.options.eager:
            return _EAGER
        return _FRESH if group.fresh else 1.0

    def _own(self, probe: Probe, load: Workload) -> None:
        assert probe.options is not None
        changed, starts = probe.options(self.system.options), self.report.starts
        try:
            with self._start(
                f"starting an engine for {probe.name}",
                probe.name,
                self.system.options.but(**changed),
                axes=(probe.name,),
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
            names = [probe.name for probe in waiting]
            with self._start(
                f"starting an {group.engine}", group.engine, options, fresh=group.fresh, axes=names
            ) as engine:
                for probe, change in group.probes:
                    whole = Change(group.label, group.changes, group.fresh)
                    requests, known = expected[probe.name]

                    def cases(probe=probe, change=change, whole=whole, requests=requests, known=known):
                        # A probe checks its own change; the case records all changes of the engine.
                        got = probe.collect(engine, load, change)
                        return probe.cases(whole, requests, known, got)

                    self._collect(probe, cases, engine, last=probe.name not in later)
                    waiting.remove(probe)
        except BiPatchError as error:
            self._could_not(waiting, error, started=self.report.starts > starts)

    def _could_not(self, probes: Sequence[Probe | CrossProbe], error: BiPatchError, *, started: bool) -> None:
        """Settle the axes of these probes, whose engine did not start or died after its start."""
        lacking = isinstance(error, EngineFailed) and error.kind in _LACKING
        for probe in probes:
            if isinstance(error, UnsupportedFeature):
                self._settle(probe.name, NOT_APPLICABLE, f"the {self.system.mode} engine refuses it: {error}")
            elif probe.optional and lacking and not started:
                self._settle(probe.name, NOT_APPLICABLE, f"this vLLM build lacks the feature: {_sentence(error)}")
            else:
                self._settle(probe.name, FAILED, _sentence(error))

    def _stop(self, why: str) -> None:
        self.report.stopped = why
        for axis in self.axes.values():
            if axis.state == WAITING and axis.compared:
                axis.settle(FAILED, why)

    def _expect_location(self, case: Case) -> None:
        """Tell the clock about the search for the first operation, which starts eager engines at the end of the run."""
        engines = 1 if case.on_one_engine else 2
        self.clock.expect_start(_LOCATE, engines * (1.0 if self.system.options.eager else _EAGER))
        self.clock.expect(_LOCATE, _TRACING)

    def _locate(self) -> None:
        """Find the first operation behind the first axis that differs, and record it, or why it was not found."""
        axis = next(axis for axis in self.report.axes if axis.case is not None)
        assert self.locate is not None and axis.case is not None
        engines = "one engine" if axis.case.on_one_engine else "two engines"
        self._expect_location(axis.case)
        began = time.monotonic()
        self.watcher.starting(f"starting {engines} to find the operation behind {axis.name}", self.clock.left())
        try:
            found = self.locate(axis.case, self.system.options, self.system.start)
        except KeyboardInterrupt:
            found = "not found: the search was interrupted"
        except Exception as error:
            found = f"not found: the search failed: {_sentence(error)}"
            if not isinstance(error, (BiPatchError, OSError)):
                self.report.failure = traceback.format_exc()
        self.report.locating = round(time.monotonic() - began, 2)
        words = found.words() if hasattr(found, "words") else found or "not found: the pair did not differ again"
        for shown in axis.shown:
            if shown.label == axis.case.label:
                shown.located = words
                break
        else:
            axis.shown[0].located = words


class NoSuchAxis(BiPatchError):
    """The caller named an axis that does not exist."""


def _within(case: Case, changes: dict[str, object]) -> Case:
    """The case with the engine's changed options in both of its scenarios."""
    alone, company = (msgspec.structs.replace(side, options=changes) for side in (case.alone, case.company))
    return msgspec.structs.replace(case, alone=alone, company=company)


def _goes_on(engine: Engine) -> bool:
    """Whether an engine that failed is alive and holds no unfinished requests."""
    if not engine.alive():
        return False
    try:
        engine.reset_cache()
    except BiPatchError:
        return False
    return True


def _sentence(error: BaseException) -> str:
    """An error on one line. Of a child's message, the path of the log stays, and the log's last lines are dropped."""
    lines = str(error).strip().replace("\nits output is in", "; its output is in").splitlines()
    if isinstance(error, EngineFailed):
        last = next((i for i, line in enumerate(lines) if "its output is in" in line), len(lines))
        lines = lines[: last + 1]
    return f"{type(error).__name__}: {' '.join(lines)}".removesuffix(": ")
