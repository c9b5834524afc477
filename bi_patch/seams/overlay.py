"""A function's own code with some of its module's names replaced: for a choice inside it that no argument steers."""

import types
from typing import Any


class Overlay:
    """Stands in for a module or object: the given attributes, and the original's for all others."""

    def __init__(self, original: Any, **attributes: Any):
        self.__dict__.update(attributes)
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def with_globals(function: types.FunctionType, **names: Any) -> types.FunctionType:
    """A copy of `function` whose global `names` are replaced; the module's other names as they are now.

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
