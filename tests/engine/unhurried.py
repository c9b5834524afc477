"""What the tests of this folder use so that a busy machine fails none of them."""

from dataclasses import replace

from openai import AsyncOpenAI

from bi_patch.tools.verify import levels

# Leaves nothing out for lack of time.
QUICK = replace(levels.QUICK, seconds=None, cpu_seconds=None)


def client(url: str) -> AsyncOpenAI:
    """A client of the server at `url`. A connection serves one request: a server closes those that are idle for 5 s,
    and a busy one may do so as the next request comes."""
    once = {"Connection": "close"}
    return AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=900, default_headers=once)
