"""Which implementation serves an operator on which device: a table, so that a platform is a folder and nothing else.

Every folder of `FOLDERS` has the same modules, functions and signatures. `bi_patch/training/cpu` states them in its
docstrings, with shapes and dtypes. An operator `torch.ops.bi_training.<name>` calls the function `<name>` of the module
that its definition names.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bi_patch import settings
from bi_patch.errors import UnsupportedDevice
from bi_patch.ops import vector_math

if TYPE_CHECKING:
    import torch

NAMESPACE = "bi_training"
FOLDERS = {"cpu": "bi_patch.training.cpu", "cuda": "bi_patch.training.cuda"}  # by torch's type of device

# PyTorch removes an operator when its library is freed, so this list keeps the libraries.
_libraries: list[torch.library.Library] = []


def define(
    schema: str, module: str, fake: Callable, backward: Callable | None = None, setup: Callable | None = None
) -> Any:
    """Define torch.ops.bi_training.<name> for every device, and return it.

    schema: in PyTorch's syntax. module: the module of each device's folder that holds a function with the operator's
    name. fake: returns empty tensors of the results' shapes and dtypes. backward, setup: as in
    torch.library.register_autograd. torch.compile and checkpointing see the operator as one node.
    """
    import torch

    name = schema.partition("(")[0]
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(schema)
    for device in FOLDERS:
        library.impl(name, _of(device, module, name), device.upper())
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup, lib=library)
    _libraries.append(library)
    return getattr(torch.ops.bi_training, name).default


@functools.cache  # every operator of every layer asks
def implementation(device: str, module: str = "") -> Any:
    """A module of a device's folder, or the folder's package. Raises UnsupportedDevice if there is no folder."""
    if device not in FOLDERS:
        raise UnsupportedDevice(
            f"training.device: bi_patch has no operators with a backward on {device}. Use cpu or cuda"
        )
    return importlib.import_module(f"{FOLDERS[device]}.{module}" if module else FOLDERS[device])


def prepare(device: str) -> None:
    """Load what a device's operators need, before the first of them runs."""
    vector_math.settle()
    implementation(device).prepare(settings.read().cache.expanduser())


def _of(device: str, module: str, name: str) -> Callable:
    """The implementation, imported at the first call: a machine without a device needs none of its libraries."""

    def run(*args):
        return getattr(implementation(device, module), name)(*args)

    return run
