"""The start-up check inspects every module that holds a copy of a seam's target, under any name."""

import sys
import types

import pytest

from bi_patch.arming import process, startup, switch
from bi_patch.errors import SeamOpen
from bi_patch.platforms.releases import BY_PLATFORM
from bi_patch.seams.model import Seam, Target
from bi_patch.seams.plan import Plan, Planned
from bi_patch.settings import Settings


def stock():
    return "stock"


def ours():
    return "ours"


@pytest.fixture
def modules(monkeypatch):
    """Two modules: `check_home` defines the target; `check_user` has imported the target under another name."""
    home, user = types.ModuleType("check_home"), types.ModuleType("check_user")
    home.target = user.renamed = stock
    for module in (home, user):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    target = Target("check_home", "target", copies=("check_user", "check_not_loaded"))
    seam = Seam(name="check.test", targets=(target,), close=lambda original: ours, why="why", how="how", until="never")
    plan = Plan(BY_PLATFORM["cpu"][-1], "cpu", (Planned(seam, target),), (), ())
    monkeypatch.setattr(process, "_state", process.State(Settings(), plan, None))
    return home, user


def looked():
    (finding,) = startup.inspect()
    return finding.status, finding.reason


def test_a_renamed_copy_is_replaced_and_the_seam_is_closed(modules):
    home, user = modules
    switch.close_module(home)
    assert home.target is user.renamed is ours
    assert looked() == (startup.CLOSED, "")


def test_a_copy_of_the_original_opens_the_seam(modules):
    home, user = modules
    switch.close_module(home)
    user.again = stock
    assert looked() == (startup.OPEN, "check_user still holds the original, as again")
    with pytest.raises(SeamOpen, match="check_user still holds the original"):
        startup.check()


def test_a_copy_that_something_else_took_the_place_of_opens_the_seam(modules):
    home, user = modules
    del user.renamed
    switch.close_module(home)
    user.renamed = lambda: "theirs"
    assert looked()[0] == startup.OPEN and "check_user holds no copy of the replacement" in looked()[1]


def test_a_large_module_that_no_process_loaded_is_not_loaded_by_the_check(modules, monkeypatch):
    (planned,) = process.state().plan.seams
    lazy = Seam(**{**vars(planned.seam), "on_import": True})
    plan = Plan(BY_PLATFORM["cpu"][-1], "cpu", (Planned(lazy, planned.target),), (), ())
    monkeypatch.setattr(process, "_state", process.State(Settings(), plan, None))
    (finding,) = startup.inspect(large=False)
    assert finding.status == startup.OPEN  # the module is loaded, and nobody closed the seam
    monkeypatch.delitem(sys.modules, "check_home")
    (finding,) = startup.inspect(large=False)
    assert (finding.status, finding.reason) == (startup.CLOSED, "as soon as its module is loaded")
    assert startup.inspect()[0].status == startup.OPEN


def test_a_large_module_that_needs_a_missing_package_is_not_open(modules, monkeypatch, tmp_path):
    (planned,) = process.state().plan.seams
    lazy = Seam(**{**vars(planned.seam), "on_import": True})
    (tmp_path / "check_needy.py").write_text("import check_absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    for seam, status in ((lazy, startup.CLOSED), (planned.seam, startup.OPEN)):
        plan = Plan(BY_PLATFORM["cpu"][-1], "cpu", (Planned(seam, Target("check_needy", "target")),), (), ())
        monkeypatch.setattr(process, "_state", process.State(Settings(), plan, None))
        (finding,) = startup.inspect()
        assert finding.status == status and "check_absent" in finding.reason
