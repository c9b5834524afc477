"""The ledger restores every original object itself, for every kind of attribute."""

import sys
import types

import pytest

from bi_patch.arming.ledger import Ledger


class Base:
    def inherited(self):
        return "base"


class Target(Base):
    def method(self):
        return "stock"

    @staticmethod
    def static():
        return "stock"

    @classmethod
    def of_class(cls):
        return "stock"


@pytest.fixture
def module():
    made = types.ModuleType("ledger_target")
    made.Target, made.function, made.value = Target, len, 3
    return made


def test_replace_and_restore_by_identity(module):
    before = dict(vars(Target))
    ledger = Ledger()
    ledger.replace("a", module, "Target.method", lambda original: lambda self: original(self) + "+")
    ledger.replace("b", module, "Target.static", lambda original: staticmethod(lambda: original() + "+"))
    ledger.replace("c", module, "Target.of_class", lambda original: classmethod(lambda cls: "ours"))
    ledger.replace("d", module, "Target.inherited", lambda original: lambda self: "ours")
    ledger.replace("e", module, "function", lambda original: original.__call__)
    target = Target()
    answers = target.method(), Target.static(), Target.of_class(), target.inherited()
    assert answers == ("stock+", "stock+", "ours", "ours")
    assert all(entry.is_closed() for entry in ledger.entries)
    ledger.restore()
    assert dict(vars(Target)) == before and all(vars(Target)[k] is v for k, v in before.items())
    assert "inherited" not in vars(Target) and module.function is len and not ledger.entries


def test_a_later_replacement_is_noticed(module):
    ledger = Ledger()
    entry = ledger.replace("a", module, "Target.method", lambda original: lambda self: "ours")
    stock = entry.original
    Target.method = lambda self: "theirs"
    assert not entry.is_closed()
    ledger.restore()
    assert vars(Target)["method"] is stock


def test_missing_target(module):
    with pytest.raises(AttributeError):
        Ledger().replace("a", module, "Target.gone", lambda original: original)


def test_copies_of_a_function(module):
    other = types.ModuleType("ledger_copy")
    other.function = module.function
    sys.modules["ledger_copy"] = other
    try:
        ledger = Ledger()
        entry = ledger.replace("a", module, "function", lambda original: lambda x: -1)
        ledger.copy("a", "ledger_copy", entry)
        assert other.function is module.function and other.function("x") == -1
        ledger.restore()
        assert other.function is len and module.function is len
    finally:
        del sys.modules["ledger_copy"]


def test_a_copy_under_another_name(module):
    other = types.ModuleType("ledger_renamed")
    other.first, other.second = module.function, module.function  # `import function as first`, `second = first`
    sys.modules["ledger_renamed"] = other
    try:
        ledger = Ledger()
        entry = ledger.replace("a", module, "function", lambda original: lambda x: -1)
        ledger.copy("a", "ledger_renamed", entry)
        assert other.first is other.second is module.function and other.first("x") == -1
        ledger.restore()
        assert other.first is other.second is len and not hasattr(other, "function")
    finally:
        del sys.modules["ledger_renamed"]


def test_a_copy_taken_after_arming_is_restored_too(module):
    later = types.ModuleType("ledger_later")
    sys.modules["ledger_later"] = later
    try:
        ledger = Ledger()
        ledger.replace("a", module, "function", lambda original: lambda x: -1)
        later.renamed = module.function  # as `from ledger_target import function as renamed` does
        ledger.restore()
        assert later.renamed is len and module.function is len
    finally:
        del sys.modules["ledger_later"]
