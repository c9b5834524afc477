"""The gate looks at every module that holds a copy of a seam's target, under whatever name."""

import sys
import types

import pytest

from bi_patch.arming import gate, switch
from bi_patch.errors import SeamOpen
from bi_patch.seams.model import Seam, Target
from bi_patch.seams.plan import Plan, Planned
from bi_patch.settings import Settings


def stock():
    return "stock"


def ours():
    return "ours"


@pytest.fixture
def modules(monkeypatch):
    """`gate_home`, which defines the target, and `gate_user`, which took it under another name before."""
    home, user = types.ModuleType("gate_home"), types.ModuleType("gate_user")
    home.target = user.renamed = stock
    for module in (home, user):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    target = Target("gate_home", "target", copies=("gate_user", "gate_not_loaded"))
    seam = Seam("gate.test", (target,), lambda original: ours, why="why", how="how", until="never")
    plan = Plan("0.32.0", "cpu", (Planned(seam, target),), (), ())
    monkeypatch.setattr(switch, "_state", switch.State(Settings(), plan))
    return home, user


def looked():
    (finding,) = gate.inspect()
    return finding.status, finding.reason


def test_a_renamed_copy_is_replaced_and_the_seam_is_closed(modules):
    home, user = modules
    switch.close_module(home)
    assert home.target is user.renamed is ours
    assert looked() == (gate.CLOSED, "")


def test_a_copy_of_the_original_opens_the_seam(modules):
    home, user = modules
    switch.close_module(home)
    user.again = stock
    assert looked() == (gate.OPEN, "gate_user still holds the original, as again")
    with pytest.raises(SeamOpen, match="gate_user still holds the original"):
        gate.verify()


def test_a_copy_that_something_else_took_the_place_of_opens_the_seam(modules):
    home, user = modules
    del user.renamed
    switch.close_module(home)
    user.renamed = lambda: "theirs"
    assert looked()[0] == gate.OPEN and "gate_user holds no copy of the replacement" in looked()[1]
