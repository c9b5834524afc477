"""Requests on their way into the engine core: its input thread checks them before the scheduler has them.

So a check against other requests must look at those on their way, too. Only requests with an adapter and parts of
streamed inputs have such a check. One thread checks, another one adds to the scheduler; each step below is a single one
of a dict.
"""

from __future__ import annotations

from typing import Any

ON_THEIR_WAY = "_bi_patch_arriving"  # attribute of vLLM's EngineCore: id(Request) -> Request


def note(core: Any, request: Any) -> None:
    """Note a checked request, vLLM's Request, until `arrived`. core: vLLM's EngineCore."""
    core.__dict__.setdefault(ON_THEIR_WAY, {})[id(request)] = request


def arrived(core: Any, request: Any) -> None:
    """The scheduler has the request, or refused it."""
    getattr(core, ON_THEIR_WAY, {}).pop(id(request), None)


def everyone(core: Any) -> list[Any]:
    """All requests of an engine core: those of its scheduler, then those on their way, in their order."""
    # In this order of reading, no request is missed that arrives meanwhile.
    coming = list(core.__dict__.get(ON_THEIR_WAY, {}).values())
    return [*list(core.scheduler.requests.values()), *coming]


def latest(core: Any, name: str) -> Any:
    """The latest request of this id, or None: of a streamed input, its latest part on the way or what came before."""
    coming = [request for request in list(core.__dict__.get(ON_THEIR_WAY, {}).values()) if request.request_id == name]
    return coming[-1] if coming else core.scheduler.requests.get(name)
