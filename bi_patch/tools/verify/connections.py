"""The HTTP client of verify.server: a connection serves one request, and one that breaks before an answer is asked for
again."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable

AGAIN = 2  # times that a request is sent again


def client(openai, healthy: Callable[[], Awaitable[bool]], again: Callable[[], None]):
    """An HTTP client for openai.AsyncOpenAI(http_client=...). openai: the imported package. healthy: whether the server
    answers its health check. again: called for each request that is sent again.

    A server closes connections that are idle for some seconds (uvicorn: 5), and a request that it gets at that moment
    breaks. So no connection waits for a second request. A request whose connection breaks before the head of an answer
    arrives is sent again, at most AGAIN times and only if the server is healthy. Timeouts, errors that the server
    answers, and answers that end half way are raised.
    """
    own = openai.DefaultAsyncHttpxClient
    # The package that the client was made with: httpx or httpx2, by the release of openai.
    httpx = sys.modules[next(base for base in own.__mro__ if "httpx" in base.__module__).__module__.partition(".")[0]]
    broken = (httpx.NetworkError, httpx.RemoteProtocolError)

    class Client(own):
        async def send(self, request, *, stream: bool = False, **given):
            answer = await self._head(request, given)
            if not stream:
                try:
                    await answer.aread()
                finally:
                    await answer.aclose()
            return answer

        async def _head(self, request, given: dict):
            for left in reversed(range(AGAIN + 1)):
                try:
                    return await super().send(request, stream=True, **given)
                except broken:
                    if not left or not await healthy():
                        raise
                    again()

    return Client(headers={"Connection": "close"})
