"""One of several ranks, as a program: `agreeing.py RANK RANKS FOLDER` prints what the ranks' agreement says, as JSON.

The ranks repeat it with other answers of rank 1. In the last case, rank 1 is not armed, and does something else.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from bi_patch.errors import BiPatchError, UnsupportedFeature
from bi_patch.seams import agreement

OWN = {"bi_patch": "0123", "vLLM": "0.33.0 for cuda", "settings": "", "device": "H200"}
CASES = {"alike": {}, "bi_patch": {"bi_patch": "4567"}, "settings": {"settings": "8"}, "device": {"device": "H100"}}


def asked(group, answer):
    agreement._own = lambda: answer
    begin = time.monotonic()
    try:
        agreement.check("communicator.order", group)
        said = ""
    except BiPatchError as error:
        said = f"{type(error).__name__}: {error}"
    return [said, time.monotonic() - begin]


def together(group, own):
    try:
        agreement.together(group, own)
    except BiPatchError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(rank, ranks, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    group = SimpleNamespace(world_size=ranks, cpu_group=dist.group.WORLD)
    found = {name: asked(group, OWN | (change if rank == 1 else {})) for name, change in CASES.items()}
    found["together"] = together(group, UnsupportedFeature("no route") if rank == 1 else None)
    found["nothing"] = together(group, None)
    found["every"] = [agreement.every(group, True), agreement.every(group, rank != 1)]
    agreement.SECONDS = 5
    done = [Path(folder) / f"done {other}" for other in range(ranks)]
    asking = Path(folder) / "asking"
    dist.barrier()
    if rank == 1:
        limit = time.monotonic() + 600
        while time.monotonic() < limit and not all(done[other].exists() for other in range(ranks) if other != 1):
            time.sleep(0.05)
    else:
        if rank != 0:
            asking.touch()
        while not asking.exists():  # rank 0 asks last, and gives each of the others SECONDS
            time.sleep(0.05)
        found["not armed"] = asked(group, OWN)
        done[rank].touch()
    print(json.dumps(found), flush=True)


main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
