"""The instruments of an engine child, which a parent runs with `ChildEngine.ask`: traces, accuracy, sleep, pauses, new
weights, calls.

Only the engine children of verify have instruments; no serving process has them. A tool with its own kind of child adds
instruments there with `register`. The tool faults does so.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from bi_patch.tools.verify.answers import Answer, Request
from bi_patch.tools.verify.case import Pause, Update
from bi_patch.tools.verify.engine import LocalEngine
from bi_patch.tools.verify.trace import Trace

COMPILED = "compilation.cache_key"  # the seam named for a difference in compiled code
PREFIX = "weights.first_block"  # the seam named for cached keys and values of other weights
ADAPTERS = "lora.keys"  # the seam named for cached keys and values of another adapter
PARTS = "streamed.seeds"  # the seam named for a draw of a part of a streamed input


class TraceAsk(msgspec.Struct, frozen=True):
    """Answer `requests` together and trace the target, the request at `index`. watch: see Tracer. coarse: see Trace."""

    requests: list[Request]
    index: int
    watch: tuple[str, str] | None = None
    coarse: bool = False


class InFlight(msgspec.Struct, frozen=True):
    """Answer `requests` together, and give the engine new weights after their first steps."""

    update: Update
    requests: list[Request]


class Traced(msgspec.Struct, frozen=True):
    """The target's answer, its trace, and the status of every seam that the trace names."""

    answer: Answer
    trace: Trace
    statuses: dict[str, str]


def traced(engine: LocalEngine, ask: TraceAsk) -> Traced:
    """Answer the requests and trace the target. Raises NotTraceable where the model does not run in this process."""
    from bi_patch.tools.verify import owners, runner, trace

    held = runner.model_runner(engine)
    tracer = trace.Tracer(runner.module_names(held), owners.Owners().seam, owners.kernel, ask.watch, ask.coarse)
    with runner.attach(held, tracer, ask.requests, ask.index).attached():
        answer = engine.generate(ask.requests)[ask.index]
    names = {call.seam for call in tracer.calls if call.seam} | {PREFIX, ADAPTERS, PARTS}
    names |= {COMPILED} if ask.coarse else set()
    return Traced(answer, Trace(tracer.calls, ask.coarse), {name: owners.status(name) for name in names})


def _trace(engine: LocalEngine, data: bytes) -> bytes:
    return msgspec.msgpack.encode(traced(engine, msgspec.msgpack.decode(data, type=TraceAsk)))


def _precision(engine: LocalEngine, data: bytes) -> bytes:
    from bi_patch.tools.verify import precision

    return msgspec.msgpack.encode(precision.measure(engine, msgspec.msgpack.decode(data, type=bool)))


def _sleep(engine: LocalEngine, data: bytes) -> bytes:
    engine.sleep(msgspec.msgpack.decode(data, type=int))
    return b""


def _pause(engine: LocalEngine, data: bytes) -> bytes:
    engine.pause(msgspec.msgpack.decode(data, type=Pause))
    return b""


def _update(engine: LocalEngine, data: bytes) -> bytes:
    from bi_patch.tools.verify import updates

    updates.update(engine, msgspec.msgpack.decode(data, type=Update))
    return b""


def _update_in_flight(engine: LocalEngine, data: bytes) -> bytes:
    from bi_patch.tools.verify import updates

    ask = msgspec.msgpack.decode(data, type=InFlight)
    return msgspec.msgpack.encode(updates.in_flight(engine, ask.update, ask.requests))


def _held(engine: LocalEngine, data: bytes) -> bytes:
    from bi_patch.tools.verify import updates

    return msgspec.msgpack.encode(updates.held())


def _calls(engine: LocalEngine, data: bytes) -> bytes:
    from bi_patch.tools.verify import overhead

    return msgspec.msgpack.encode(overhead.count(engine, msgspec.msgpack.decode(data, type=list[Request])))


Instrument = Callable[[LocalEngine, bytes], bytes]  # (engine, arguments as msgpack) -> result as msgpack

SERVED: dict[str, Instrument] = {
    "trace": _trace,
    "precision": _precision,
    "sleep": _sleep,
    "pause": _pause,
    "update": _update,
    "update in flight": _update_in_flight,
    "held": _held,
    "calls": _calls,
}


def register(name: str, instrument: Instrument) -> None:
    """Add an instrument to this process; the parent runs the instrument with `ChildEngine.ask(name, ...)`."""
    SERVED[name] = instrument
