"""What the tests of this folder use so that a busy machine fails none of them."""

import warnings
from dataclasses import replace

import openai
from openai import AsyncOpenAI

from bi_patch.tools.verify import connections, levels

# Leaves nothing out for lack of time.
QUICK = replace(levels.QUICK, seconds=None, cpu_seconds=None)


def client(url: str) -> AsyncOpenAI:
    """A client of the server at `url`, with the connections of `bi-patch verify --url`."""

    async def healthy() -> bool:
        return True  # a server that has died breaks the request that is sent again, too

    http = connections.client(
        openai, healthy, again=lambda: warnings.warn("a connection broke: asked again", stacklevel=2)
    )
    return AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=900, http_client=http)
