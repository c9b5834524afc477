"""The process of parity: verify's worker with an engine and a trainer, and the instrument that measures a line."""

from __future__ import annotations

import contextlib
import importlib
import time
import traceback

import msgspec

from bi_patch.errors import BiPatchError
from bi_patch.tools.parity.plan import LINE, LINES, RUNS, Ask, Plan
from bi_patch.tools.verify import instruments, worker
from bi_patch.tools.verify.engine import LocalEngine, Options
from bi_patch.tools.verify.report import FAILED, Axis

_sessions: list = []  # the session of this process, once it exists


def main() -> None:
    instruments.register(LINE, _line)
    instruments.register(RUNS, _runs)
    worker.main(_inspect_here)


def _inspect_here(options: Options) -> None:
    """vLLM imports a model's module in a process of its own, to keep its front end free of CUDA, and that process
    imports all of vLLM again. An engine of one rank runs in its front end's process, so it needs none."""
    if options.extra.get("tensor_parallel_size", 1) != 1:
        return
    with contextlib.suppress(ImportError):
        registry = importlib.import_module("vllm.model_executor.models.registry")
        registry._run_in_subprocess = lambda inspect: inspect()


def _line(engine: LocalEngine, data: bytes) -> bytes:
    return msgspec.msgpack.encode(measure(session(engine), msgspec.msgpack.decode(data, type=Ask)))


def _runs(engine: LocalEngine, data: bytes) -> bytes:
    return msgspec.msgpack.encode([run for run, _ in session(engine).runs])


def session(engine: LocalEngine):
    """The session of this process: made at the first call, with a trainer beside the engine."""
    from bi_patch import arming
    from bi_patch.tools.parity import trainers
    from bi_patch.tools.parity.session import Session

    if not _sessions:
        state = arming.state()
        armed = state is not None and state.armed
        _sessions.append(Session(engine, (trainers.Armed if armed else trainers.Trainer)(engine), Plan()))
    return _sessions[0]


def measure(session, ask: Ask) -> Axis:
    """Measure one line of this session. A named error makes the line failed; other errors are raised."""
    from bi_patch.tools.parity import faults, first, lines

    line = next(line for line in LINES if line.name == ask.line)
    session.plan = ask.plan
    axis = Axis(line.name, line.about)
    start = time.perf_counter()
    try:
        with faults.planted(ask.plan.fault, session):
            session.looking = None
            for label, difference in lines.MEASURES[line.name](session):
                axis.count(label, difference)
                if difference.differing and ask.locate and session.looking and not axis.shown[0].located:
                    # Now: the weights and caches are still those of the comparison.
                    axis.shown[0].located = first.words(session)
            axis.settle()
    except BiPatchError as error:
        traceback.print_exc()
        axis.settle(FAILED, f"{type(error).__name__}: {error}")
    axis.seconds = time.perf_counter() - start
    return axis
