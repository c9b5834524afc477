"""What stops one rank's start stops every rank, with the reason; real ranks over gloo."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore

from bi_patch.seams import stages

PROGRAM = Path(__file__).with_name("staged.py")
FAILED = "CertificateFailed: an encoder gives other bits"
OTHER = " (rank 1 said this, and stopped)"


def run(case, place, ranks=2):
    """What each rank printed, its log and exit code."""
    command = [sys.executable, PROGRAM]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    held = [subprocess.Popen([*command, str(n), str(ranks), place, case], **pipes) for n in range(ranks)]
    try:
        for process in (*held[:1], *held[2:]):  # rank 1 stays until its stdin ends
            process.wait(600)
        return [(*process.communicate(timeout=600), process.returncode) for process in held]
    finally:
        for process in held:
            process.kill()


@pytest.fixture
def port(free_tcp_port):
    return f"tcp:{free_tcp_port}"


@pytest.fixture(params=["tcp", "file", "layers", "launcher"])
def place(request, free_tcp_port, tmp_path):
    """Where ranks meet: each kind of store that vLLM 0.26 to 0.33 makes, or that a program can hand to PyTorch."""
    if request.param == "launcher":
        agent = TCPStore("127.0.0.1", free_tcp_port, None, True, wait_for_workers=False)
        yield f"launcher:{free_tcp_port}"
        del agent
    else:
        yield f"{request.param}:{tmp_path / 'store' if request.param == 'file' else free_tcp_port}"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no certificate", [FAILED + OTHER, FAILED, FAILED + OTHER]),
        ("no memory", [f"BiPatchError: no memory{OTHER}", "ValueError: no memory"]),
    ],
    ids=["no certificate", "no memory"],
)
def test_every_rank_says_the_same(case, said, port):
    assert [json.loads(out) for out, _, _ in run(case, port, len(said))] == said


def test_a_healthy_start_leaves_nothing_that_runs(place):
    """The ranks wait for the end of the threads that look after the others."""
    assert [(json.loads(out), code) for out, _, code in run("well", place)] == [("", 0), ("", 0)]


def test_a_rank_that_waits_ends_with_the_reason(place):
    """Rank 1's process stays, so nothing else wakes a rank that waits for it."""
    (first, log, code), (second, _, _) = run("waiting", place)
    assert (first, code, json.loads(second)) == ("", 1, FAILED)
    assert f"an encoder gives other bits{OTHER}. This rank waits for that rank, so this process ends" in log


def test_with_a_store_that_has_no_second_connection_ranks_look_after_none(tmp_path):
    assert [json.loads(out) for out, _, _ in run("well", f"python:{tmp_path}/well")] == ["", ""]
    said = [json.loads(out) for out, _, _ in run("nobody looks", f"python:{tmp_path}/failing")]
    assert said == ["", "ValueError: no memory"]


def test_a_rank_that_has_started_ends_where_another_fails_later(port):
    (first, _, _), (second, log, code) = run("later", port)
    assert json.loads(first) == "CertificateFailed: a late one" and json.loads(second) == ""
    assert code == 1 and "a late one (rank 0 said this, and stopped)" in log


def test_one_rank_asks_nobody():
    stages.watch(SimpleNamespace(world_size=1))
    worker = SimpleNamespace(load_model=lambda: 3)
    stages.guard(worker)
    assert worker.load_model() == 3 and not hasattr(worker, "init_device")


def test_ranks_that_fail_alike_wait_for_nobody(port):
    own, others = [f"ValueError: of rank {rank}" for rank in (0, 1)], [caused_by(1), caused_by(0)]
    said = [json.loads(out) for out, _, _ in run("alike", port)]
    assert said in (own, [own[0], others[1]], [others[0], own[1]])  # by which rank came first, or neither


def test_an_error_after_another_ranks_is_its_consequence(port):
    said = [json.loads(out) for out, _, _ in run("after", port)]
    assert said == [caused_by(1), "ValueError: of rank 1"]


def caused_by(rank):
    return f"BiPatchError: of rank {rank} (rank {rank} said this, and stopped) (from another)"


def test_a_new_engine_does_not_hear_of_the_one_before():
    stages._watches.append(object())
    stages.guard(SimpleNamespace())
    assert not stages._watches


class Asked:
    """A store that lacks one method, as a store that a program has written may."""

    def __init__(self, lacks):
        self.lacks = lacks

    def __getattr__(self, name):
        if name == self.lacks:
            raise NotImplementedError(name)
        return lambda *_: 0


@pytest.mark.parametrize("lacks", ["check", "compare_set", "add"])
def test_a_store_that_lacks_a_method_carries_nothing(lacks, caplog):
    caplog.set_level("INFO", stages._log.name)
    assert not stages._answers(Asked(lacks)) and f"({lacks})" in caplog.text
    assert stages._answers(Asked("nothing"))
