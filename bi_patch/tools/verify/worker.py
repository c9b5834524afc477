"""The process of an engine child: arms itself as its environment says, starts the engine, and answers commands.

Standard output and error go to the log that the parent chose, so vLLM's prints cannot reach the reply pipe.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable

from bi_patch.errors import BiPatchError
from bi_patch.tools.verify import instruments, wire
from bi_patch.tools.verify.engine import LocalEngine, Options


def main(before: Callable[[Options], None] = lambda options: None) -> None:
    """Answer commands from standard input; replies go to the file descriptor in sys.argv[2].

    before: called when this process is armed, before its engine starts.
    """
    replies = os.fdopen(int(sys.argv[2]), "wb")
    engine: LocalEngine | None = None
    for command in wire.commands(sys.stdin.buffer):
        try:
            if command.do == "stop":
                break
            if command.do == "start":
                engine = _start(command, before)
                reply = wire.Reply(info=engine.info)
            else:
                reply = _serve(engine, command)
        except BaseException as error:  # the parent raises it
            traceback.print_exc()
            reply = _failure(error)
        wire.send(replies, reply)
    # Skip vLLM's teardown, which can take seconds and is not needed here.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _start(command: wire.Command, before: Callable[[Options], None]) -> LocalEngine:
    from bi_patch import arming

    if os.environ.get("VLLM_BATCH_INVARIANT") == "1":
        arming.arm()  # before vLLM is imported; BI_PATCH=0 leaves upstream's own mode
    assert command.options is not None
    before(command.options)
    return LocalEngine(command.options)


def _serve(engine: LocalEngine | None, command: wire.Command) -> wire.Reply:
    if engine is None:
        raise RuntimeError("no engine was started")
    if command.do == "generate":
        started = time.perf_counter()
        answers = engine.generate(command.requests)
        return wire.Reply(seconds=time.perf_counter() - started, answers=wire.pack(answers))
    if command.do == "reset_cache":
        engine.reset_cache()
        return wire.Reply()
    if command.do == "chunk":
        engine.set_chunk(command.chunk)
        return wire.Reply()
    if command.do == "logprobs":
        engine.set_logprobs(command.text or None)
        return wire.Reply()
    if command.do == "counters":
        return wire.Reply(counters=engine.counters())
    if command.do == "encode":
        return wire.Reply(tokens=list(engine.encode(command.text)))
    if command.do in instruments.SERVED:
        return wire.Reply(data=engine.ask(command.do, command.data))
    raise RuntimeError(f"unknown command {command.do!r}")


def _failure(error: BaseException) -> wire.Reply:
    """The reply for an exception: bi_patch's error behind it, if any, since vLLM wraps the errors of its parts."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, BiPatchError):
            return wire.Reply(error=type(seen).__name__, message=str(seen), named=True)
        seen = seen.__cause__ or seen.__context__
    return wire.Reply(error=type(error).__name__, message=str(error))
