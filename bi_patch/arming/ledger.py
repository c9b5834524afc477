"""The ledger: every attribute that arming replaced, with the original, so that disarming can restore it."""

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import wrapt


@dataclass
class Entry:
    """One replaced attribute. inherited: the owner had no such attribute of its own before, only an inherited one."""

    seam: str
    owner: Any
    attribute: str
    original: Any
    replacement: Any
    inherited: bool

    def is_closed(self) -> bool:
        return vars(self.owner).get(self.attribute) is self.replacement

    def restore(self) -> None:
        if self.inherited:
            delattr(self.owner, self.attribute)
        else:
            setattr(self.owner, self.attribute, self.original)


class Ledger:
    """Entries in the order in which they were made."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def replace(self, seam: str, module: Any, qualname: str, close: Any) -> Entry:
        """Replace `module.qualname` with `close(original)`. Raises AttributeError if the module lacks it."""
        owner, attribute, _ = wrapt.resolve_path(module, qualname)
        # The raw entry of the class dictionary, so that disarming restores a static or class method as it was.
        original = _raw(owner, attribute)
        return self._set(seam, owner, attribute, original, close(original))

    def copy(self, seam: str, module_name: str, entry: Entry) -> None:
        """Give the replacement to a module that copied the original with `from x import y` or `... import y as z`."""
        module = sys.modules.get(module_name)
        for name in names_of(entry.original, module):
            self._set(seam, module, name, entry.original, entry.replacement)

    def of(self, seam: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.seam == seam]

    def seams(self) -> set[str]:
        """The names of the seams that have entries."""
        return {entry.seam for entry in self.entries}

    def restore(self) -> None:
        """Restore every original, newest first, and forget the entries.

        A module that copied a replacement with `from x import y` gets the original, too.
        """
        while self.entries:
            entry = self.entries.pop()
            entry.restore()
            if isinstance(entry.owner, ModuleType):
                for module in list(sys.modules.values()):
                    for name in names_of(entry.replacement, module):
                        setattr(module, name, entry.original)

    def _set(self, seam: str, owner: Any, attribute: str, original: Any, replacement: Any) -> Entry:
        entry = Entry(seam, owner, attribute, original, replacement, attribute not in vars(owner))
        setattr(owner, attribute, replacement)
        self.entries.append(entry)
        return entry


def names_of(value: Any, module: ModuleType | None) -> list[str]:
    """Every name under which a module holds this very object. Empty if the module is not loaded."""
    return [n for n, held in vars(module).items() if held is value] if isinstance(module, ModuleType) else []


def _raw(owner: Any, attribute: str) -> Any:
    for scope in getattr(owner, "__mro__", (owner,)):
        if attribute in vars(scope):
            return vars(scope)[attribute]
    raise AttributeError(f"{owner!r} has no attribute {attribute!r}")
