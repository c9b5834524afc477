"""Ranks of one engine that do the same, each in its own process, as an external launcher (torchrun) starts them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

# For engines of several GPUs. NVLink multicast is not allowed on every virtual host.
NO_MULTICAST = {
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
# Arguments of vllm.LLM for each rank. FlashInfer's sum with a norm takes multicast, so stock engines have it off.
LAUNCHED = {"distributed_executor_backend": "external_launcher", "seed": 0}
UNFUSED = {"pass_config": {"fuse_allreduce_rms": False}}
# Functions of NCCL 2.29.7, without which vLLM does not load a host's NCCL. Only sleeping communicators call them.
SUSPENDS = ("ncclCommSuspend", "ncclCommResume")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl
_inputs: list[int] = []  # of rank 0: where the other ranks read


def fork(count: int, out: str) -> str:
    """Fork ranks 1 up to `count` from this process, which becomes rank 0. Call before CUDA starts.

    out: this process's result file. Returns the rank's own: other ranks write beside it, and print to "OUT.rank1.log".
    Rank 0 ends when another rank fails; the others end with rank 0.
    """
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    os.environ |= NO_MULTICAST | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    sys.stdout.flush()
    for rank in range(1, count):
        theirs, ours = os.pipe()
        # Made before the fork, for rank 0 may read it before this rank runs.
        log = os.open(f"{out}.rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        process = os.fork()
        if not process:
            return _become(rank, theirs, log, [ours, *_inputs], f"{out}.rank{rank}")
        os.close(theirs)
        os.close(log)
        _inputs.append(ours)
        threading.Thread(target=_watch, args=(process, Path(f"{out}.rank{rank}.log")), daemon=True).start()
    return out


def _become(rank: int, stdin: int, log: int, others: list[int], out: str) -> str:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    for descriptor in others:
        os.close(descriptor)
    _inputs.clear()
    for descriptor, standard in ((stdin, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, standard)
    os.close(stdin)
    os.close(log)
    sys.stdin = open(0, closefd=False)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return out


def _watch(process: int, log: Path) -> None:
    if os.waitpid(process, 0)[1]:
        print(f"{log.name} ended:\n{log.read_text(errors='replace')[-3000:]}", flush=True)
        os._exit(1)


def own_nccl() -> None:
    """Let vLLM load the host's NCCL where it is older than 2.29.7. Call before vLLM connects its ranks."""
    from vllm.distributed.device_communicators import pynccl_wrapper

    library = pynccl_wrapper.NCCLLibrary
    library.exported_functions = [f for f in library.exported_functions if f.name not in SUSPENDS]


def pin() -> None:
    """Keep every thread of this rank on its share of the host's cores, so that no rank moves another."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // int(os.environ["WORLD_SIZE"]))
    first = int(os.environ["RANK"]) * share % len(cores)
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(int(thread), cores[first : first + share])


def lines() -> Iterator[str]:
    """The lines of stdin. Rank 0 passes each on to the other ranks first."""
    for line in sys.stdin:
        for descriptor in _inputs:
            os.write(descriptor, line.encode())
        yield line
