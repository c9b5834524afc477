"""One rank of a worker's start, as a program: `staged.py RANK RANKS PLACE CASE` prints what its stages raise, as JSON.

PLACE is where the ranks meet: "KIND:NUMBER OR PATH", with a kind of STORES. Rank 1 fails in CASE, and its process
stays. The other ranks wait for it in an exchange, or do not.
"""

import json
import os
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import torch.distributed as dist

from bi_patch.errors import BiPatchError, CertificateFailed
from bi_patch.seams import stages

ENDS = ("waiting", "later", "in a sum")  # cases in which a rank's process ends, because nothing else wakes it
stages.LOOK, stages.HEARD = 0.1, 600.0  # a rank that nobody hears would show


class Own(dist.Store):
    """A store in Python, which PyTorch cannot clone. Ranks meet in another."""

    def __init__(self, store):
        super().__init__()
        self._store = store

    def set(self, key, value):
        self._store.set(key, value)

    def get(self, key):
        return self._store.get(key)

    def add(self, key, number):
        return self._store.add(key, number)

    def check(self, keys):
        return self._store.check(keys)

    def wait(self, keys, limit=timedelta(minutes=30)):
        self._store.wait(keys, limit)


def of_port(rank, ranks, port):
    return dist.TCPStore("127.0.0.1", int(port), ranks, rank == 0, wait_for_workers=False)


def of_file(rank, ranks, path):
    """As vLLM's executor mp makes it."""
    return dist.FileStore(path, ranks)


def of_layers(rank, ranks, port):
    """As a program that connects the ranks itself may make it."""
    return dist.PrefixStore("outer", dist.PrefixStore("inner", of_port(rank, ranks, port)))


def of_python(rank, ranks, path):
    return Own(of_file(rank, ranks, path))


def of_launcher(rank, ranks, port):
    """None: PyTorch finds the store of torchrun's agent, which is another process, in the environment."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"


STORES = {"tcp": of_port, "file": of_file, "layers": of_layers, "python": of_python, "launcher": of_launcher}


class Worker:
    def __init__(self, rank, case):
        self.rank, self.case = rank, case

    def init_device(self):
        stages.watch(SimpleNamespace(world_size=dist.get_world_size(), rank_in_group=self.rank))
        if self.case == "in a sum":
            summed(self.rank)

    def load_model(self):
        if self.case == "waiting":
            meeting = dist.distributed_c10d._get_default_store()
            meeting.set("there", "") if self.rank == 0 else meeting.wait(["there"])
        if self.rank == 1 and self.case in ("no certificate", "waiting"):
            raise CertificateFailed("an encoder gives other bits")
        if self.rank == 1 and self.case in ("no memory", "nobody looks"):
            raise ValueError("no memory")
        if self.case in ("alike", "after"):
            dist.barrier()
            if self.case == "after" and self.rank == 0:
                until(lambda: stages._watches[0]._heard)
            raise ValueError(f"of rank {self.rank}")
        if self.case == "waiting":
            dist.barrier()  # rank 1 never comes
        if self.case in ("no certificate", "no memory"):
            until(lambda: stages._watches[0]._heard)

    def compile_or_warm_up_model(self):
        if self.rank != 1 and self.case == "later":
            until(lambda: stages._watches[0]._store.add("started", 0))  # rank 1's start is over
            raise CertificateFailed("a late one")
        if self.case == "well":
            dist.barrier()


def summed(rank):
    """The check of sums over ranks. Rank 1 has no memory for the third message, for which the others wait."""
    import torch
    from vllm.distributed import parallel_state

    from bi_patch.seams import agreement, ranks

    calls = []

    def all_reduce(x):
        calls.append(x)
        if rank == 1 and len(calls) == 3:
            raise MemoryError("no memory for a message")
        dist.all_reduce(x)
        return x

    agreement.check = lambda name, group: None
    stages.watch = lambda world: None  # it watches already
    group = SimpleNamespace(world_size=2, rank_in_group=rank, all_reduce=all_reduce, device="cpu")
    group.cpu_group = dist.new_group(backend="gloo")
    parallel_state.get_tp_group = parallel_state.get_world_group = lambda: group
    model = SimpleNamespace(get_hidden_size=lambda: 64, dtype=torch.float32)
    config = SimpleNamespace(model_config=model, scheduler_config=SimpleNamespace(max_num_batched_tokens=16))
    config.parallel_config = SimpleNamespace(tensor_parallel_size=2)
    ranks.closing("communicator.order", False, "")(lambda config: None)(config)


def until(true):
    while not true():
        time.sleep(0.05)


def main(rank, ranks, place, case):
    stages.GRACE = 2.0 if case in ENDS else 600.0
    kind, _, where = place.partition(":")
    store = STORES[kind](rank, ranks, where)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    worker, said = Worker(rank, case), ""
    stages.guard(worker)
    try:
        for name in stages.STAGES:
            if hasattr(worker, name):
                getattr(worker, name)()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, BiPatchError) and error.__cause__ is not None:
            said += " (from another)"
    if case == "well":
        for watch in stages._watches:
            watch._thread.join()  # nothing is left that could delay the end
    print(json.dumps(said), flush=True)
    if case == "later" and rank == 1:
        time.sleep(600)  # a rank that has started ends, too
    if case in ("waiting", "in a sum") and rank == 1:
        sys.stdin.read()  # its process stays, as that of a worker that answers a call


main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
