"""New weights of data-parallel engine cores: all of them take the weights, or none computes any more."""

import asyncio
import functools

from bi_patch.seams.common.weights import READING, SPLIT
from bi_patch.seams.model import Seam, Target

_CALL = "collective_rpc"


def _every_core(original):
    """DPLBAsyncMPClient.call_utility_async: a call that may write weights and fails in some engine cores alone stops
    all of them at their next step."""

    @functools.wraps(original)
    async def call_utility_async(self, method, *args):
        if method != _CALL or not args or args[0] in READING:
            return await original(self, method, *args)
        found = await _ask(self, *args)
        failed = [answer for answer in found if isinstance(answer, BaseException)]
        if not failed:
            return found[0]
        if len(failed) < len(found):
            await _ask(self, SPLIT)
        raise failed[0]

    return call_utility_async


async def _ask(client, *args) -> list:
    """What each engine core of vLLM's client answers to a call to its workers, or its error."""
    calls = (client._call_utility_async(_CALL, *args, engine=engine) for engine in client.core_engines)
    return await asyncio.gather(*calls, return_exceptions=True)


SEAMS = (
    Seam(
        name="replicas.weights",
        targets=(Target("vllm.v1.engine.core_client", "DPLBAsyncMPClient.call_utility_async"),),
        close=_every_core,
        why="a write that fails in one data-parallel engine core alone leaves engine cores with other weights, and the "
        "load decides which of them serves a request",
        how="if a call that may write weights fails in some engine cores and not in others, all of them stop at their "
        "next step",
        until="upstream's front end stops engine cores whose weights differ",
        causes=(31,),
    ),
)
