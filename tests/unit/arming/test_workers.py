"""The engine asks its workers. A worker that is not armed, is armed by another bi_patch or gives no answer stops the
engine with a named error."""

from types import SimpleNamespace

import pytest

from bi_patch import identity
from bi_patch.arming import process, startup, workers
from bi_patch.errors import SeamOpen, SettingError
from bi_patch.platforms.releases import BY_PLATFORM
from bi_patch.seams.plan import Plan
from bi_patch.settings import Settings


class Executor:
    """A fake executor. Like vLLM's executors, it returns a list with one answer per worker."""

    def __init__(self, answers):
        self.answers = answers

    def collective_rpc(self, method):
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers


def test_workers_of_the_same_bi_patch_pass():
    workers.check(Executor([identity.digest()] * 2))


@pytest.mark.parametrize(
    "answers, said",
    [
        ([identity.digest(), ""], r"of 2 workers, 1 \(not armed\)"),
        (["0123"], r"0 \(0123\)"),
        (ModuleNotFoundError("No module named 'bi_patch'"), "ModuleNotFoundError: No module named 'bi_patch'"),
    ],
)
def test_others_stop_the_engine(answers, said):
    with pytest.raises(SeamOpen, match=said):
        workers.check(Executor(answers))


def test_a_process_that_is_not_armed_says_so(monkeypatch):
    monkeypatch.setattr(process, "_state", None)
    monkeypatch.delenv(process.SWITCH, raising=False)
    assert workers.report(None) == ""


def test_another_platform_than_the_plan_s_is_named(monkeypatch):
    import vllm.platforms

    runs = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True, device_type="cuda")
    monkeypatch.setattr(vllm.platforms, "_current_platform", runs)
    for planned, wrong in (("cuda", False), ("cpu", True), ("ascend", True)):
        state = process.State(Settings(), Plan(BY_PLATFORM[planned][-1], planned, (), (), ()), None)
        monkeypatch.setattr(process, "_state", state)
        if wrong:
            with pytest.raises(SettingError, match=f"the patch points for {planned}, but vLLM runs on cuda"):
                startup.check_platform()
        else:
            startup.check_platform()
