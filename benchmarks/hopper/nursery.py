"""Starts the engines of one mode by fork from a process that has imported vLLM.

Importing vLLM takes up to a minute on a fresh host, and engines that start side by side all wait for the same files.
A nursery imports it once. Its engines are forked, as vLLM forks its engine core. Where CUDA does not start in a forked
process, the engine's process starts anew, with the same pipes.

    nursery.py MODE SOCKET MODULE...    (started by Nursery)
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

MODULES = ("vllm", "vllm.entrypoints.llm", "vllm.v1.engine.llm_engine")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl


class Nursery:
    """The process that forks engines of one mode of child.MODES. It ends with the process that made it."""

    def __init__(self, mode: str, modules: Sequence[str] = MODULES) -> None:
        self.mode = mode
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, __file__, mode, str(theirs.fileno()), *modules]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()

    def fork(self, command: Sequence[str], stdin: int, stdout: int) -> int:
        """Start `command`, a script and its arguments, with these descriptors; stdout is stderr, too. Returns the
        process's id. Waits until vLLM is imported. Raises OSError if the nursery has ended."""
        socket.send_fds(self._socket, [json.dumps(list(command)).encode()], [stdin, stdout])
        answer = self._socket.recv(64)
        if not answer:
            raise BrokenPipeError(f"the nursery of {self.mode} engines ended")
        return int(answer)

    def end(self) -> None:
        """End the nursery, and with it the engines that are left."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def nurseries(modes: Sequence[str], modules: Sequence[str] = MODULES) -> Iterator[dict[str, Nursery]]:
    """A nursery of each mode. They import side by side, and end with the block."""
    made = {mode: Nursery(mode, modules) for mode in modes}
    try:
        yield made
    finally:
        for nursery in made.values():
            nursery.end()


def _serve(mode: str, requests: socket.socket, modules: Sequence[str]) -> None:
    import child

    child.environment(mode)
    if mode in child.ARMED:
        import bi_patch  # noqa: F401  arms before vLLM loads
    for module in modules:
        importlib.import_module(module)
    with contextlib.suppress(ImportError):
        _inspect_here()
    forks = "vllm" not in sys.modules or _cuda_starts()
    print(f"nursery of {mode} engines: imported{'' if forks else ', CUDA does not start in forks'}", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended engines leave no zombies
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 16, 2)
        if not message:
            return
        process = os.fork()
        if not process:
            requests.close()
            _become(json.loads(message), descriptors, forks)
        for descriptor in descriptors:
            os.close(descriptor)
        requests.send(str(process).encode())


def _inspect_here() -> None:
    """vLLM imports a model's module in a process of its own first, to keep its front end free of CUDA. Each of these
    processes imports all of vLLM again. The engines here run in their front end's process, so they need none."""
    if "vllm" in sys.modules:
        registry = importlib.import_module("vllm.model_executor.models.registry")
        registry._run_in_subprocess = lambda inspect: inspect()


def _cuda_starts() -> bool:
    """Whether CUDA starts in a process that is forked from this one. True where there is no CUDA."""
    import torch

    if not torch.version.cuda:
        return True
    process = os.fork()
    if not process:
        try:
            torch.zeros(1, device="cuda")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(process, 0)[1] == 0


def _become(command: list[str], descriptors: Sequence[int], forks: bool) -> None:
    """Run the script of `command` in this forked process. Does not return."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        for descriptor, standard in zip((descriptors[0], descriptors[1], descriptors[1]), range(3), strict=True):
            os.dup2(descriptor, standard)
        for descriptor in descriptors:
            os.close(descriptor)
        if not forks:
            os.execv(sys.executable, [sys.executable, *command])
        sys.stdin = open(0, closefd=False)
        sys.argv = command
        sys.path[0] = str(Path(command[0]).resolve().parent)
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = 0 if end.code is None else 1
        print(end.code or "", flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[2])) as held:
        _serve(sys.argv[1], held, sys.argv[3:])
