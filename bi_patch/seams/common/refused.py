"""The error of a refused request, in the type that the installed vLLM reports as a bad request."""

import functools

from bi_patch.errors import UnsupportedRequest


def bad_request(message: str) -> UnsupportedRequest:
    """An error to raise. From vLLM 0.32 on, a server answers 400 only to vLLM's own type, and 500 to any ValueError."""
    return _type()(message)


@functools.cache
def _type() -> type[UnsupportedRequest]:
    from vllm.exceptions import VLLMValidationError

    return type("UnsupportedRequest", (VLLMValidationError, UnsupportedRequest), {"__module__": __name__})
