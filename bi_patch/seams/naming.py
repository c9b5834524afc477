"""Names of code, in the keys of certificates and in errors."""

import functools


def dotted(value) -> str:
    """The module and name of a function or of a callable object's class. A partial function has its function's name."""
    while isinstance(value, functools.partial):
        value = value.func
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
