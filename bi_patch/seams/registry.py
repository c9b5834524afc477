"""Collect all seams, variables and policies from the modules of seams/, in alphabetical order."""

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

from bi_patch.seams import ascend, common, cpu, cuda
from bi_patch.seams.model import ALL_PLATFORMS, Catalog

# The folder of a declaration decides which platforms need it.
_FOLDERS = (
    (common, ALL_PLATFORMS),
    (cpu, frozenset({"cpu"})),
    (cuda, frozenset({"cuda"})),
    (ascend, frozenset({"ascend"})),
)


def _modules(folder: ModuleType) -> Iterator[ModuleType]:
    for name in sorted(module.name for module in pkgutil.iter_modules(folder.__path__)):
        yield importlib.import_module(f"{folder.__name__}.{name}")


def _collect(attribute: str) -> tuple:
    return tuple(
        dataclasses.replace(item, platforms=platforms)
        for folder, platforms in _FOLDERS
        for module in _modules(folder)
        for item in getattr(module, attribute, ())
    )


CATALOG = Catalog(_collect("SEAMS"), _collect("VARIABLES"), _collect("POLICIES"))
