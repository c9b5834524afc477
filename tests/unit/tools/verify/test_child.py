"""How an engine child ends and what stays of it, tested on a stand-in that speaks the worker's protocol."""

import base64
import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from bi_patch.errors import SeamOpen
from bi_patch.tools.verify import child, wire
from bi_patch.tools.verify.answers import Answer, AnswerIncomplete, Request
from bi_patch.tools.verify.child import ARMED, ChildEngine, EngineFailed
from bi_patch.tools.verify.engine import Options

START = """
import json, os, subprocess, sys, time
out = os.fdopen(int(sys.argv[2]), "wb", buffering=0)
INFO = {"mode": "armed", "vllm": "", "torch": "", "device": "", "threads": 1, "block_size": 16, "vocab_size": 500}
def reply(**values):
    out.write(json.dumps(values).encode() + b"\\n")
for line in sys.stdin:
    do = json.loads(line)["do"]
    if do == "stop":
        os._exit(0)
    if do == "start":
        %s
    else:
        %s
"""
HELD = 600  # seconds for which a child or its helper would run
STARTED = "reply(info=INFO)"
HELPER = f"helper = subprocess.Popen(['sleep', '{HELD}'], pass_fds=(out.fileno(),))"


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """worker(at start, at other commands): code that children run in place of the worker. Logs are under tmp_path."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def use(start=STARTED, other="reply()"):
        monkeypatch.setattr(child, "_CODE", START % (start, other))
        return lambda: ChildEngine(ARMED, Options("none"), environ=dict(os.environ))

    return use


def left(folder):
    return [path.name for path in Path(folder).iterdir()]


def group(leader):
    """The running processes of a group."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    pairs = [line.split() for line in listed.splitlines()]
    return [pair for pair in pairs if pair[0] == str(leader) and not pair[1].startswith("Z")]


def test_a_child_that_ends_well_leaves_nothing(worker, tmp_path):
    with worker()() as engine:
        assert engine.alive() and engine.counters() == {}
    assert not engine.alive() and left(tmp_path) == []


def test_a_fresh_child_has_no_compiled_code_and_what_vllm_knows_of_models(worker, tmp_path):
    known = tmp_path / "vllm"
    for name in ("modelinfos", "torch_compile_cache"):
        (known / name).mkdir(parents=True)
        (known / name / "a.json").touch()
    worker()
    environ = os.environ | {"VLLM_CACHE_ROOT": str(known)}
    with ChildEngine(ARMED, Options("none"), environ=environ, fresh=True) as engine:
        caches = Path(engine._caches.name)
        assert [path.relative_to(caches).as_posix() for path in caches.rglob("*")] == [
            "vllm_cache_root",
            "vllm_cache_root/modelinfos",
            "vllm_cache_root/modelinfos/a.json",
        ]
    assert not caches.exists()


def test_a_named_error_leaves_no_log(worker, tmp_path):
    with pytest.raises(SeamOpen, match="norm.x"):
        worker("reply(error='SeamOpen', message='norm.x', named=True)")()
    assert left(tmp_path) == []


def test_another_error_names_its_log_which_stays(worker, tmp_path):
    with pytest.raises(EngineFailed, match="no memory") as caught:
        worker("reply(error='RuntimeError', message='no memory')")()
    assert caught.value.kind == "RuntimeError" and left(tmp_path) == [caught.value.log.name]


@pytest.mark.parametrize(
    "last, said",
    [
        ("os.kill(os.getpid(), 9)", r"ended \(-9\)"),
        ("out.write(b'{\"seconds\": 1'); os._exit(3)", r"ended \(3\)"),
        ("out.write(b'{\"seconds\": \\n')", "cannot be read"),
    ],
    ids=["killed", "half a reply", "no reply"],
)
def test_an_end_is_noticed_though_its_own_children_hold_the_pipe(worker, last, said):
    began = time.monotonic()
    with pytest.raises(EngineFailed, match=said):
        with worker(f"{HELPER}; {STARTED}", last)() as engine:
            engine.counters()
    assert time.monotonic() - began < HELD / 2 and not group(engine._process.pid)


def test_an_interrupt_ends_a_starting_child_and_its_children_at_once(worker, monkeypatch, tmp_path):
    pid, waits, line = tmp_path / "pid", threading.Event(), ChildEngine._line
    made = worker(f"{HELPER}; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep({HELD})")
    monkeypatch.setattr(ChildEngine, "_line", lambda self: waits.set() or line(self))

    def interrupt():
        waits.wait()
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        made()
    leader = int(pid.read_text())
    assert time.monotonic() - began < HELD / 2 and not group(leader) and left(tmp_path) == ["pid"]


def test_a_second_interrupt_leaves_no_child(worker, monkeypatch):
    with contextlib.suppress(KeyboardInterrupt):
        with worker()() as engine:
            wait = engine._process.wait

            def interrupted(timeout=None):
                if timeout is not None:
                    raise KeyboardInterrupt
                return wait()

            monkeypatch.setattr(engine._process, "wait", interrupted)
    assert not group(engine._process.pid)


def test_answers_without_what_was_asked_for_are_refused(worker):
    packed = base64.b64encode(wire.pack([Answer([1, 2])])).decode()  # as JSON holds bytes
    with worker(other=f"reply(answers={packed!r})")() as engine:
        with pytest.raises(AnswerIncomplete, match="2 tokens came with 0 logprobs"):
            engine.generate([Request((1, 2), max_tokens=2)])


def test_threads_of_an_engine_reach_its_process():
    asked = child.child_environ({"OMP_NUM_THREADS": "8"}, ARMED, Options("none", threads=3))
    assert (asked["OMP_NUM_THREADS"], asked["VLLM_CPU_OMP_THREADS_BIND"]) == ("3", "nobind")
    assert child.child_environ({"OMP_NUM_THREADS": "8"}, ARMED, Options("none"))["OMP_NUM_THREADS"] == "8"
