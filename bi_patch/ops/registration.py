"""bi_patch's own operators, torch.ops.bi_patch.*. torch.compile calls them and does not trace into them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# By operator. PyTorch removes an operator when its library is freed, so this dict keeps the libraries.
_libraries: dict[str, torch.library.Library] = {}


def define(schema: str, run: Callable, key: str, fake: Callable) -> None:
    """Define torch.ops.bi_patch.<name>. A second definition of the same name does nothing.

    schema: in PyTorch's syntax, e.g. "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor". run: the function that
    computes the results. key: the dispatch key of `run`, "CUDA" or "CPU". fake: takes the same arguments and returns
    empty tensors of the results' shapes and dtypes; torch.compile traces with it.

    Raises ValueError for an argument with a default. A graph of torch.compile leaves out arguments that equal their
    defaults, and the call in the graph would then pass through PyTorch's dispatcher (bi_patch.ops.direct).
    """
    import torch

    from bi_patch.ops import direct

    name = schema.partition("(")[0]
    if name in _libraries:
        return
    if "=" in schema:
        raise ValueError(f"{name}: no argument may have a default")
    library = torch.library.Library("bi_patch", "FRAGMENT")
    library.define(schema)
    library.impl(name, run, key)
    library.impl(name, fake, "Meta")
    _libraries[name] = library
    direct.shorten(getattr(torch.ops.bi_patch, name).default, run, key)
