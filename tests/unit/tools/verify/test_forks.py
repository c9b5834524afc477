"""Which environments get a prepared process, and when engine children are forks."""

import os
import select
import subprocess

import pytest

from bi_patch.errors import UnsupportedRelease
from bi_patch.tools.verify import forks
from bi_patch.tools.verify.child import ChildEngine


class Prepared:
    """In place of a process that has imported vLLM."""

    ready = True

    def __init__(self, env):
        self.env, self.closed, self.used = env, False, False

    def busy(self):
        return self.used

    def close(self):
        self.closed = True


@pytest.fixture
def made(monkeypatch):
    """The prepared processes of the test, in order."""
    found = []

    def prepare(env):
        found.append(Prepared(env))
        return found[-1]

    monkeypatch.setattr(forks, "_Prepared", prepare)
    return found


def test_the_process_used_least_recently_makes_room(made):
    held = forks.Forks(2)
    first, second = held._for({"A": "1"}), held._for({"A": "2"})
    assert held._for({"A": "1"}) is first
    third = held._for({"A": "3"})
    assert second.closed and not first.closed and made == [first, second, third]
    first.used = third.used = True
    held._for({"A": "4"})
    assert not first.closed and not third.closed
    held.close()
    assert all(process.closed for process in made)


def test_a_kept_process_stays_and_others_start_afresh(made):
    held = forks.Forks(1, keep=True)
    first = held._for({"A": "1"})
    assert held._for({"A": "2"}) is None and held._for({"A": "1"}) is first
    assert made == [first] and not first.closed


def test_children_are_forks_on_cpu_only(made, monkeypatch):
    monkeypatch.setattr(ChildEngine, "launch", staticmethod(subprocess.Popen))

    def serves(answer):
        monkeypatch.setattr(forks, "_serves", lambda: answer)

    serves(False)
    with forks.forking():
        assert ChildEngine.launch is subprocess.Popen
    serves(True)
    with forks.forking():
        outer = ChildEngine.launch
        assert outer is not subprocess.Popen
        with forks.forking():
            assert ChildEngine.launch is outer
        assert ChildEngine.launch is outer
        outer.__self__._for({"A": "1"})
    assert ChildEngine.launch is subprocess.Popen and [process.closed for process in made] == [True]


def test_a_fork_ends_with_the_process_that_asked_for_it(tmp_path, monkeypatch):
    """A killed test left an engine that computed for an hour."""
    control = "import socket, sys; control = socket.socket(fileno=int(sys.argv[1]))"
    monkeypatch.setattr(forks, "_CODE", f"{control}; from bi_patch.tools.verify import forks; forks._serve(control)")
    tmp_path.joinpath("busy.py").write_text("def main():\n    while True:\n        pass\n")
    held = forks._Prepared(os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"})
    alive, replies = os.pipe()
    with tmp_path.joinpath("log").open("w") as log:
        held.fork(worker="busy", log=log, replies=replies)
    os.close(replies)
    assert held.busy() and not select.select([alive], [], [], 0)[0]
    held.close()
    assert select.select([alive], [], [], 300)[0] and os.read(alive, 1) == b""  # nobody holds the other side any more
    os.close(alive)


@pytest.mark.parametrize("platform,answer", [("cpu", True), ("cuda", False), ("ascend", False)])
def test_only_the_cpu_build_is_forked(monkeypatch, platform, answer):
    found = forks.installed.Installed(None, None, platform, "")
    monkeypatch.setattr(forks.installed, "find", lambda: found)
    assert forks._serves() is answer


def test_without_a_known_vllm_nothing_is_forked(monkeypatch):
    def find():
        raise UnsupportedRelease("unknown")

    monkeypatch.setattr(forks.installed, "find", find)
    assert not forks._serves()
