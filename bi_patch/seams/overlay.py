"""Replace global names inside one function, for a choice in its code that no argument controls."""

import types
from typing import Any


class Overlay:
    """A stand-in for a module or object: it has the given attributes, and the original's attributes otherwise."""

    def __init__(self, original: Any, **attributes: Any):
        self.__dict__.update(attributes)
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def with_globals(function: types.FunctionType, **names: Any) -> types.FunctionType:
    """A copy of `function` that sees `names` as globals. The copy keeps the present values of all other globals.

    Raises NameError for a name that the module does not have.
    """
    missing = [name for name in names if name not in function.__globals__]
    if missing:
        raise NameError(f"{function.__module__} has no global {', '.join(missing)}")
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__doc__ = function.__doc__
    copy.__module__ = function.__module__
    copy.__qualname__ = function.__qualname__
    return copy
