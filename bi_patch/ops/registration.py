"""bi_patch's own operators, torch.ops.bi_patch.*: compiled code calls them and cannot look inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# By operator. A library that is freed takes its operator away, so each is kept for the life of the process.
_libraries: dict[str, torch.library.Library] = {}


def define(schema: str, run: Callable, key: str, fake: Callable) -> None:
    """Define torch.ops.bi_patch.<name> by its schema. A second definition of the same name does nothing.

    schema: in PyTorch's syntax, e.g. "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor". run: what computes, on
    the dispatch key `key` ("CUDA" or "CPU"). fake: the same arguments -> empty tensors of the results' shapes and
    dtypes, for tracing.
    """
    import torch

    name = schema.partition("(")[0]
    if name in _libraries:
        return
    library = torch.library.Library("bi_patch", "FRAGMENT")
    library.define(schema)
    library.impl(name, run, key)
    library.impl(name, fake, "Meta")
    _libraries[name] = library
