"""The routes of a model's linear layers on CPU, by number: compiled code has a layer's number, and calls its route."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Protocol, TypeVar

from bi_patch.errors import CertificateFailed

if TYPE_CHECKING:
    import torch


class Route(Protocol):
    """What a layer's route holds besides its kernels. n, k: the weight's shape [n, k]."""

    n: int
    k: int
    layer: weakref.ref[torch.nn.Module]


R = TypeVar("R", bound=Route)


class Routes(dict[int, R]):
    """Routes by number. A route lives as long as its layer, and keeps its number.

    attribute: the name under which a layer keeps its number. operation: as certificates name it. kind: of the layers,
    in words.
    """

    def __init__(self, attribute: str, operation: str, kind: str):
        super().__init__()
        self._attribute, self._operation, self._kind = attribute, operation, kind
        self._numbers = itertools.count()

    def of(self, layer: torch.nn.Module) -> R | None:
        """The route of a layer, or None."""
        return self.get(getattr(layer, self._attribute, None))

    def within(self, model: torch.nn.Module) -> list[R]:
        """The routes of a model's layers."""
        return [held for layer in model.modules() if (held := self.of(layer)) is not None]

    def add(self, layer: torch.nn.Module, route: R) -> int:
        """Give a layer a route, and the route a number."""
        number = next(self._numbers)
        setattr(layer, self._attribute, number)
        self[number] = route
        weakref.finalize(layer, self.pop, number, None)
        return number

    def called(self, number: torch.Tensor, n: int, k: int) -> tuple[R, torch.nn.Module]:
        """The route that compiled code asks for, and its layer. number: int64, without dimensions.

        Raises CertificateFailed if no living layer has this number, or if its weight has other sizes than [n, k].
        """
        held = self.get(number.item()) if number.ndim == 0 else None
        layer = None if held is None else held.layer()
        if layer is None or (held.n, held.k) != (n, k):
            raise CertificateFailed(
                f"{self._operation}: compiled code asks for a {self._kind} N={n} K={k} that its model does not have. "
                "Delete vLLM's compile cache, and start the engine again"
            )
        return held, layer
