"""The protocol of a parent and its engine child: JSON lines. Answers are msgpack, which keeps a float's bits."""

from __future__ import annotations

from typing import IO

import msgspec

from bi_patch.tools.verify.answers import Answer, Request
from bi_patch.tools.verify.engine import Info, Options


class Command(msgspec.Struct, omit_defaults=True):
    """From parent to child. `do`: start, generate, reset_cache, counters, chunk, logprobs, encode, stop, or an
    instrument's name.

    text: what to encode, or the logprobs mode. data: the arguments of the instrument (see verify.instruments).
    """

    do: str
    options: Options | None = None
    requests: list[Request] = []
    text: str = ""
    chunk: int | None = None
    data: bytes = b""


class Reply(msgspec.Struct, omit_defaults=True):
    """From child to parent, one reply for each command.

    error: the name of an exception class, "" for success. named: whether the exception is a BiPatchError.
    """

    answers: bytes = b""
    seconds: float = 0.0
    info: Info | None = None
    counters: dict[str, float] = {}
    tokens: list[int] = []
    error: str = ""
    message: str = ""
    named: bool = False
    data: bytes = b""


_ANSWERS = msgspec.msgpack.Decoder(list[Answer])


def pack(answers: list[Answer]) -> bytes:
    return msgspec.msgpack.encode(answers)


def unpack(data: bytes) -> list[Answer]:
    return _ANSWERS.decode(data)


def send(stream: IO[bytes], message: Command | Reply) -> None:
    stream.write(msgspec.json.encode(message) + b"\n")
    stream.flush()


def commands(stream: IO[bytes]):
    """Yield commands until the parent closes the pipe."""
    decoder = msgspec.json.Decoder(Command)
    for line in stream:
        yield decoder.decode(line)
