"""One rank of a worker's start, as a program: `staged.py RANK RANKS PORT CASE` prints what its stages raise, as JSON.

Rank 1 fails in CASE, and its process stays. The other ranks wait for it in an exchange, or do not.
"""

import json
import sys
import time
from types import SimpleNamespace

import torch.distributed as dist

from bi_patch.errors import BiPatchError, CertificateFailed
from bi_patch.seams import stages

stages.LOOK, stages.GRACE, stages.HEARD = 0.1, 2.0, 600.0  # a rank that nobody hears would show


class Worker:
    def __init__(self, rank, case):
        self.rank, self.case = rank, case

    def init_device(self):
        stages.watch(SimpleNamespace(world_size=dist.get_world_size(), rank_in_group=self.rank))

    def load_model(self):
        if self.case == "waiting":
            meeting = dist.distributed_c10d._get_default_store()
            meeting.set("there", "") if self.rank == 0 else meeting.wait(["there"])
        if self.rank == 1 and self.case in ("no certificate", "waiting"):
            raise CertificateFailed("an encoder gives other bits")
        if self.rank == 1 and self.case == "no memory":
            raise ValueError("no memory")
        if self.case in ("alike", "after"):
            dist.barrier()
            while self.case == "after" and self.rank == 0 and not stages._watches[0]._heard:
                time.sleep(0.05)
            raise ValueError(f"of rank {self.rank}")
        if self.case == "waiting":
            dist.barrier()  # rank 1 never comes
        if self.case in ("no certificate", "no memory"):
            time.sleep(1)

    def compile_or_warm_up_model(self):
        if self.rank != 1 and self.case == "later":
            time.sleep(0.5)  # nothing went wrong before; rank 1 has started already
            raise CertificateFailed("a late one")
        if self.case == "well":
            dist.barrier()


def main(rank, ranks, port, case):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
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
    print(json.dumps(said), flush=True)
    if case == "later" and rank == 1:
        time.sleep(600)  # a rank that has started ends, too
    if case == "waiting" and rank == 1:
        sys.stdin.read()  # its process stays, as that of a worker that answers a call


main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
