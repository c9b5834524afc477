"""Starts engine children as forks of a process that has armed itself and imported vLLM: an import costs 7 s of a core.

A fork has the environment, the arming and the modules of a fresh child of the same environment. Where such a process
cannot be prepared (arming or an import raises), the child is started afresh, and meets the reason itself. The tests
start their engines so, and `bi-patch verify` on CPU. An engine with empty caches (the axis "restart") is always a fresh
process. On a GPU every engine is: nobody has tried forks of a process that imported vLLM for CUDA.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

from bi_patch import installed
from bi_patch.errors import BiPatchError
from bi_patch.ops import vector_math
from bi_patch.tools.verify.child import ChildEngine

_CODE = "import bi_patch_entry; bi_patch_entry.run('bi_patch.tools.verify.forks')"
MOST = 3  # prepared processes at a time: each keeps about 0.5 GB
_READY = b"ready\n"
_MODULES = (
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "bi_patch.tools.verify.worker",
)


class Forks:
    """The prepared processes of this process, one for each environment of a child.

    most: the number of prepared processes at a time. keep: a prepared process stays until the end, and children of
    further environments are started afresh. Otherwise the process that was used least recently makes room.
    """

    def __init__(self, most: int = MOST, *, keep: bool = False) -> None:
        self._most, self._keep = most, keep
        self._lock = threading.Lock()  # a prepared process answers one message at a time
        self._prepared: OrderedDict[str, _Prepared] = OrderedDict()

    def launch(
        self, argv: Sequence[str], *, stdin, stdout, stderr, pass_fds, start_new_session: bool, env: Mapping[str, str]
    ) -> _Fork | subprocess.Popen:
        """As subprocess.Popen in ChildEngine: argv ends with the worker's module and the descriptor of the replies."""
        with self._lock, contextlib.suppress(OSError):
            if (found := self._for(env)) is not None:
                return found.fork(worker=argv[-2], log=stdout, replies=pass_fds[0])
        return subprocess.Popen(
            argv, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=pass_fds, start_new_session=True, env=env
        )

    def close(self) -> None:
        while self._prepared:
            self._prepared.popitem()[1].close()

    def _for(self, env: Mapping[str, str]) -> _Prepared | None:
        key = json.dumps(sorted(env.items()))
        if key not in self._prepared:
            if self._keep and len(self._prepared) >= self._most:
                return None
            idle = [k for k, made in self._prepared.items() if not made.busy()]
            for old in idle[: max(0, len(self._prepared) + 1 - self._most)]:
                self._prepared.pop(old).close()
            self._prepared[key] = _Prepared(env)
        self._prepared.move_to_end(key)
        return self._prepared[key] if self._prepared[key].ready else None


@contextlib.contextmanager
def forking(most: int = 1) -> Iterator[None]:
    """Within this context, engine children of the first environments are forks, on CPU. Contexts may be nested.

    most: of how many environments. More than one pays where engines of each environment start several times.
    """
    if not _serves() or ChildEngine.launch is not subprocess.Popen:
        yield
        return
    forks = Forks(most, keep=True)
    ChildEngine.launch = staticmethod(forks.launch)
    try:
        yield
    finally:
        ChildEngine.launch = staticmethod(subprocess.Popen)
        forks.close()


def _serves() -> bool:
    try:
        found = installed.find()
    except BiPatchError:  # the engine's start tells it
        return False
    return found is not None and found.platform == "cpu"


class _Prepared:
    def __init__(self, env: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CODE, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=dict(env),
            )
        self._socket, self._forks = ours, []
        self.ready = self._socket.recv(64) == _READY  # b"": the process has ended

    def busy(self) -> bool:
        return any(fork.poll() is None for fork in self._forks)

    def fork(self, *, worker: str, log, replies: int) -> _Fork:
        take, stdin = os.pipe()
        ended, tell = os.pipe()
        try:
            given = array.array("i", [take, log.fileno(), replies, tell])
            self._socket.sendmsg([worker.encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, given)])
            pid = int(self._socket.recv(64) or 0)
        except BaseException:
            os.close(stdin)
            os.close(ended)
            raise
        finally:
            os.close(take)
            os.close(tell)
        if not pid:
            os.close(stdin)
            os.close(ended)
            raise ConnectionResetError("the prepared process has ended")
        made = _Fork(pid, os.fdopen(stdin, "wb", buffering=0), ended)
        self._forks.append(made)
        return made

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


class _Fork:
    """What ChildEngine needs of subprocess.Popen, for a child of another process."""

    def __init__(self, pid: int, stdin, ended: int) -> None:
        self.pid, self.stdin, self.returncode, self._ended = pid, stdin, None, ended

    def poll(self) -> int | None:
        return self._look(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._look(timeout) is None:
            raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout)
        return self.returncode

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], timeout)[0]:
            text = os.read(self._ended, 64)
            os.close(self._ended)
            self.returncode = int(text) if text else -signal.SIGKILL
        return self.returncode


def _serve(control: socket.socket) -> None:
    """Fork for every message, until the other side closes: the message is the worker's module, with descriptors. Forks
    that are left then, e.g. where a test was killed, end with this process."""
    wake, woken = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, int] = {}  # process id -> the descriptor that takes its exit code
    control.send(_READY)
    while True:
        told = select.select([control, wake], [], [])[0]
        if wake in told:
            os.read(wake, 4096)
            _reap(running)
        if control in told:
            message, ancillary, _, _ = control.recvmsg(256, socket.CMSG_SPACE(4 * 4))
            if not message:
                _end(running)
                os._exit(0)
            fds = array.array("i", ancillary[0][2][:16])
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for fd in (control.fileno(), wake, woken, fds[3], *running.values()):
                    os.close(fd)
                _become(message.decode(), *fds[:3])
            for fd in fds[:3]:
                os.close(fd)
            running[pid] = fds[3]
            control.send(str(pid).encode())


def _end(running: dict[int, int]) -> None:
    """End the forks that are left: nobody takes their answers, and one inside a long call would not notice."""
    for pid in running:
        for end in (os.kill, os.killpg):  # the process, and those that it started
            with contextlib.suppress(ProcessLookupError):
                end(pid, signal.SIGKILL)


def _reap(running: dict[int, int]) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            fd = running.pop(pid)
            with contextlib.suppress(BrokenPipeError):
                os.write(fd, str(os.waitstatus_to_exitcode(status)).encode())
            os.close(fd)


def _become(worker: str, stdin: int, log: int, replies: int) -> None:
    """Run the worker in this fork as `python -c` would, then end the process."""
    code = 1
    try:
        os.setsid()
        for fd, to in ((stdin, 0), (log, 1), (log, 2)):
            os.dup2(fd, to)
        os.close(stdin)
        os.close(log)
        import numpy

        random.seed()
        numpy.random.seed()
        sys.argv = ["-c", worker, str(replies)]
        importlib.import_module(worker).main()
        code = 0
    finally:
        os._exit(code)


def _look_at_models_here() -> None:
    """vLLM starts a process, with another import, to look at a model's class, so that its own does not touch CUDA."""
    from vllm.model_executor.models import registry

    if hasattr(registry, "_run_in_subprocess"):
        registry._run_in_subprocess = lambda look: look()


def main() -> None:
    """The prepared process: import everything, then fork for the socket in sys.argv[1]."""
    control = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    from bi_patch import arming

    if os.environ.get("VLLM_BATCH_INVARIANT") == "1":
        arming.arm()
    gc.disable()  # its visits to all modules take a third of the import
    for name in _MODULES:
        importlib.import_module(name)
    gc.freeze()  # a fork's collector neither visits nor copies them
    gc.enable()
    _look_at_models_here()
    vector_math.settle()  # in stock engines, too: seldom, a fork would have other rotary tables than the rest
    _serve(control)
