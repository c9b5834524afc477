"""Tests whether verify notices a planted fault on the fault's own axis, and whether locate names the fault."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from bi_patch.tools.faults import Fault, named, speculation
from bi_patch.tools.faults.child import FaultyEngine
from bi_patch.tools.verify import locate, precision, updates
from bi_patch.tools.verify.case import Case, Scenario, Update
from bi_patch.tools.verify.child import ChildEngine
from bi_patch.tools.verify.locate import Located
from bi_patch.tools.verify.probes import AXES, Run, Workload, updating
from bi_patch.tools.verify.probes.base import pair
from bi_patch.tools.verify.probes.crossing import crossing_blocks, preempted, repeating

PRECISION, RESTART, PREEMPTION, UPDATE, LORA = "precision", "restart", "preemption", "weight update", "LoRA"
STRUCTURED = "structured output"
POOLED = "pooled vectors"
SPECULATION = speculation.AXIS
IMAGES = "images"


class Caught(msgspec.Struct, frozen=True):
    """The result for one planted fault.

    caught: the fault's axis found a difference. right: locate named the fault's module, op and seam. compared: pairs of
    answers up to the first difference. named: the description that locate gave.
    """

    fault: str
    cause: int
    axis: str
    caught: bool
    right: bool
    compared: int
    first: str = ""
    named: str = ""
    located: Located | None = None


def workload(engine: ChildEngine) -> Workload:
    """A small workload that reaches every planted mechanism: 256 rows, full blocks, shared prefixes, partial chunks."""
    block = engine.info.block_size
    # On a GPU, attention splits a single sequence only when it has several KV tiles.
    wanted = 300 if engine.info.platform == "cpu" else 1500
    long = max(min(wanted, engine.info.max_model_len - 200), 2 * block + 30)
    return Workload.random(
        engine.info.vocab_size, lengths=(3, 37, long), generate=6, sizes=(2, 5, 16, 64), prefix=block + block // 2
    )


def cases(engine: ChildEngine, axis: str, load: Workload) -> Iterator[Case]:
    """The compared pairs of one axis, one by one. Preemption needs an engine with few KV blocks."""
    if axis == PREEMPTION:
        yield from _preemption(engine, load)
        return
    if axis == UPDATE:
        yield from _round_trips(engine, load)
        return
    if axis == SPECULATION:
        requests = repeating(engine, load)
        labels = {i: f"request {i} with drafts, beside others" for i in range(len(requests))}
        yield from (msgspec.structs.replace(c, axis=axis) for c in Run(engine, load).each(requests, labels))
        return
    probe = next(p for p in AXES if p.name == axis)
    yield from probe.cases(Run(engine, load))


def _preemption(engine: ChildEngine, load: Workload) -> Iterator[Case]:
    before = engine.counters()
    requests = crossing_blocks(engine, load)
    labels = {i: f"request {i} of a batch too large for the cache" for i in range(len(requests))}
    found = list(Run(engine, load).each(requests, labels))
    preempted(None, {k: v - before.get(k, 0.0) for k, v in engine.counters().items()})
    yield from (msgspec.structs.replace(case, axis=PREEMPTION) for case in found)


def _round_trips(engine: ChildEngine, load: Workload) -> Iterator[Case]:
    """In each way to give an engine weights: to other weights and back, on a warm cache."""
    requests = updating.requests(engine, load)
    own, other = engine.options.model, updating.other(engine.options.model)
    engine.reset_cache()
    expected = {own: engine.generate(requests)}
    for way in updating.ways(engine):
        for folder in (other, own):
            engine.ask("update", msgspec.msgpack.encode(Update(way, folder)))
            answers = engine.generate(requests)
            for i, known in enumerate(expected.setdefault(folder, answers)):
                scenario = Scenario(requests, i)
                yield msgspec.structs.replace(
                    pair(f"{way}: request {i}", scenario, scenario, known, answers[i]), axis=UPDATE
                )


def _updated(engine: FaultyEngine, fault: Fault, load: Workload) -> Caught:
    """Catch a fault of an update: the answers with the other weights, before planting, are the expected ones."""
    own, other = engine.options.model, updating.other(engine.options.model)
    requests = updating.requests(engine, load)
    longest = max(range(len(requests)), key=lambda i: len(requests[i].prompt))
    give = [Update(updates.RELOAD, other)]
    alone, company = Scenario(requests, longest), Scenario(requests, longest, [requests], updates=give)
    try:
        engine.ask("update", msgspec.msgpack.encode(give[0]))
        expected = locate.trace(engine, alone)
        engine.ask("update", msgspec.msgpack.encode(Update(updates.RELOAD, own)))
        engine.plant(fault.name)
        got = locate.trace(engine, company)
        case = msgspec.structs.replace(pair("a reload", alone, company, expected.answer, got.answer), axis=UPDATE)
        if not case.differs:
            return Caught(fault.name, fault.cause, fault.axis, False, False, 1)
        return _judged(engine, fault, case, 1, locate.judge(case, expected, got))
    finally:
        engine.plant()
        engine.ask("update", msgspec.msgpack.encode(Update(updates.RELOAD, own)))
        engine.reset_cache()


def _speculated(engine: FaultyEngine, fault: Fault, load: Workload) -> Caught:
    """Catch a fault of an engine with drafts: its answers before planting are those of an engine without drafts."""
    requests = repeating(engine, load)
    engine.reset_cache()
    expected = engine.generate(requests)
    engine.plant(fault.name)
    engine.reset_cache()
    got = engine.generate(requests)
    for i, (mine, other) in enumerate(zip(expected, got)):
        scenario = Scenario(requests, i)
        case = msgspec.structs.replace(pair(f"request {i}", scenario, scenario, mine, other), axis=SPECULATION)
        if case.differs:
            engine.plant()
            without = locate.trace(engine, scenario)
            engine.plant(fault.name)
            return _judged(engine, fault, case, i + 1, locate.judge(case, without, locate.trace(engine, scenario)))
    return Caught(fault.name, fault.cause, fault.axis, False, False, len(requests))


def catch(engine: FaultyEngine, name: str, load: Workload) -> Caught:
    """Plant a fault, run its axis up to the first difference, locate the difference, and remove the fault."""
    fault = named(name)
    try:
        if fault.axis == PRECISION:
            return _imprecise(engine, fault)
        if fault.axis == RESTART:
            return _restarted(engine, fault, load)
        if fault.axis == UPDATE:
            return _updated(engine, fault, load)
        if fault.axis == SPECULATION:
            return _speculated(engine, fault, load)
        engine.plant(name)
        compared = 0
        for case in cases(engine, fault.axis, load):
            compared += 1
            if case.differs:
                return _judged(engine, fault, case, compared, locate.locate_on(engine, case))
        return Caught(name, fault.cause, fault.axis, False, False, compared)
    finally:
        engine.plant()


def _judged(engine: ChildEngine, fault: Fault, case: Case, compared: int, located: Located | None) -> Caught:
    return Caught(
        fault.name,
        fault.cause,
        fault.axis,
        True,
        located is not None and names(fault, located, engine),
        compared,
        f"{case.label}: {case.difference.first}",
        located.words() if located else "",
        located,
    )


def names(fault: Fault, located: Located, engine: ChildEngine) -> bool:
    """Whether locate named the place of the fault."""
    seam = (fault.seam or {}).get("cpu" if engine.info.platform == "cpu" else "cuda")
    ops = (located.op, *located.only_alone, *located.only_company)
    return fault.module in located.module and any(fault.op in op for op in ops) and seam in (None, located.seam)


def _restarted(engine: FaultyEngine, fault: Fault, load: Workload) -> Caught:
    """Catch a fault of a second process: the answers before planting stand for the first process."""
    scenario = Scenario.alone(load.greedy(1))
    engine.reset_cache()
    (expected,) = engine.generate(scenario.requests)
    alone = locate.trace(engine, scenario)
    engine.plant(fault.name)
    engine.reset_cache()
    (got,) = engine.generate(scenario.requests)
    case = msgspec.structs.replace(pair("a new process", scenario, scenario, expected, got), axis=RESTART)
    if not case.differs:
        return Caught(fault.name, fault.cause, fault.axis, False, False, 1)
    return _judged(engine, fault, case, 1, locate.judge(case, alone, locate.trace(engine, scenario)))


def _imprecise(engine: FaultyEngine, fault: Fault) -> Caught:
    """Catch a fault that no comparison of bits notices: the comparison with fp64 finds the fault and names layers."""
    engine.plant(fault.name)
    found = precision.of(engine, widened=True)
    seam = (fault.seam or {}).get("cpu" if engine.info.platform == "cpu" else "cuda")
    right = len(found.failed) == found.layers and all(f.seam == seam for f in found.failed)
    first = found.failed[0] if found.failed else None
    words = (
        ""
        if first is None
        else (
            f"{first.module}: {first.excess:.0f} times the error allowed for {first.dtype} at M={first.rows}; "
            f"{len(found.failed)} of {found.layers} linears exceed it (patch point {first.seam})"
        )
    )
    return Caught(fault.name, fault.cause, fault.axis, first is not None, right, found.outputs, words, words)
