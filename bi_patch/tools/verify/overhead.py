"""How many of bi_patch's Python functions run for each request and in each step of an engine.

Each costs the host a fraction of a microsecond or more. Where the GPU is fast, a step takes as long as the host
does. Unlike times, counts are the same on every machine and in every run.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

import bi_patch
from bi_patch.tools.verify.answers import Request
from bi_patch.tools.verify.engine import LocalEngine

_ROOT = str(Path(bi_patch.__file__).resolve().parent)
_TOOLS = str(Path(_ROOT, "tools"))


class Calls(msgspec.Struct, frozen=True):
    """requests: the calls while each request was added. steps: those of each step, in order. names: those of the last
    step, by function."""

    requests: list[int]
    steps: list[int]
    names: dict[str, int]


def count(engine: LocalEngine, requests: Sequence[Request]) -> Calls:
    """Answer the requests together, and count. The engine core runs in this process."""
    held = engine.llm.llm_engine
    added: list[int] = []
    steps: list[int] = []
    names: Counter[str] = Counter()

    def counting(call: Callable, into: list[int]) -> Callable:
        def counted(*args: Any, **kwargs: Any) -> Any:
            seen: Counter[str] = Counter()
            sys.setprofile(lambda frame, event, _: event == "call" and _note(frame.f_code, seen))
            try:
                return call(*args, **kwargs)
            finally:
                sys.setprofile(None)
                into.append(seen.total())
                names.clear()
                names.update(seen)

        return counted

    held.add_request, held.step = counting(held.add_request, added), counting(held.step, steps)
    try:
        engine.generate(requests)
    finally:
        del held.add_request, held.step
    return Calls(added, steps, dict(names))


def _note(code: Any, seen: Counter[str]) -> None:
    file = code.co_filename
    if file.startswith(_ROOT) and not file.startswith(_TOOLS):
        seen[f"{file[len(_ROOT) + 1 :]}: {code.co_qualname}"] += 1
