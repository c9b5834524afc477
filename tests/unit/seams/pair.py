"""One of two ranks over gloo, as a program: `pair.py RANK FOLDER` prints what the certificate of NCCL's sum says."""

import json
import logging
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist

from bi_patch.ops import bits, collectives
from bi_patch.ops.cuda import ranks as ops
from bi_patch.seams.cuda import adder
from bi_patch.seams.cuda.communicator import SEAMS

WIDTH, ROWS, BUFFER = 96, 40, 1024
MOST = (WIDTH + 1) * ROWS  # elements of the largest message that the start-up check sends


def gathered(x):
    parts = torch.empty((2, *x.shape), dtype=x.dtype)
    dist.all_gather(list(parts.unbind()), x.contiguous())
    return parts


def added(parts):
    """In rank order. As on a GPU, each NaN of a sum has the same bits."""
    total = collectives.in_rank_order(parts)
    return torch.where(total.isnan(), float("nan"), total)


class OneStage:
    """As vLLM's CustomAllreduce."""

    disabled, mnnvl_only, max_size = False, False, BUFFER

    def __init__(self):
        self.taken = []

    def should_custom_ar(self, x):
        return x.nbytes % 16 == 0

    def custom_all_reduce(self, x):
        self.taken.append(x.numel())
        return added(gathered(x))


class Nccl:
    """As vLLM's PyNcclCommunicator, whose sum one of WAYS changes."""

    disabled = False

    def __init__(self, change=None):
        self.change, self.taken = change, []

    def all_reduce(self, x):
        self.taken.append(x.numel())
        parts = gathered(x)
        total = added(parts.flip(0))
        return total if self.change is None else self.change(total, parts)

    def all_gather(self, out, x):
        raise AssertionError("the one-stage all-reduce is on")


def flushed(total, parts):
    """Subnormal sums become zeros."""
    return torch.where(total.abs() < torch.finfo(total.dtype).smallest_normal, total * 0, total)


def without_sign(total, parts):
    return torch.where(total == 0, 0, total).to(total.dtype)


def of_another_nan(total, parts):
    return torch.where(total.isnan(), -total, total)


def truncated(total, parts):
    """Sums are not rounded to even."""
    integer = {2: torch.int16, 4: torch.int32}[total.element_size()]
    exact = parts.double().sum(0)
    over = total.double().abs() > exact.abs()
    return (total.view(integer) - over.to(integer)).view(total.dtype)


def by_size(total, parts):
    return total + 1 if total.numel() > 3000 else total


def of_one_rank(total, parts):
    return total + 1 if dist.get_rank() else total


def failing(total, parts):
    raise RuntimeError("no memory")


WAYS = (flushed, without_sign, of_another_nan, truncated, by_size, of_one_rank)


def certified(dtype, own=None, nccl=None, group=None):
    """(what was certified, what the log says, the communicator) after a start."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("vllm.bi_patch")
    log.addHandler(handler)
    model = SimpleNamespace(get_hidden_size=lambda: WIDTH, dtype=dtype)
    steps = SimpleNamespace(max_num_batched_tokens=ROWS)
    config = SimpleNamespace(model_config=model, scheduler_config=steps, parallel_config=None)
    held = SimpleNamespace(world_size=2, rank_in_group=dist.get_rank(), device_group=group)
    held.ca_comm, held.pynccl_comm = own or OneStage(), nccl or Nccl()
    team = SimpleNamespace(world_size=2, rank_in_group=held.rank_in_group, device="cpu", cpu_group=None)
    team.device_communicator = held
    adder.certify(config, team, lambda: ops.Carrier(2, held.pynccl_comm.all_gather, None))
    log.removeHandler(handler)
    made = adder.adder(held)
    return {str(d): n for d, n in made.most.items()} if made else None, said, held


def summed(held, dtype):
    """For messages up to and above the buffer: who added, and how many elements differ from rank order."""
    seam = next(seam for seam in SEAMS if seam.name == "communicator.cuda_sum")
    all_reduce, found = seam.close(None), {}
    for n in (1, BUFFER // dtype.itemsize, BUFFER // dtype.itemsize + 1, MOST, MOST + 8):
        x = collectives._random_bits(n, dist.get_rank(), dtype, "cpu")
        held.ca_comm.taken.clear()
        held.pynccl_comm.taken.clear()
        differing = bits.differing(all_reduce(held, x), added(gathered(x)))
        found[n * dtype.itemsize] = len(held.ca_comm.taken), len(held.pynccl_comm.taken), differing
    return found


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.cuda.is_current_stream_capturing = lambda: False  # a build for CPU has none
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        most, said, held = certified(dtype)
        found[str(dtype)] = most, said, summed(held, dtype)
        for way in WAYS:
            most, said, held = certified(dtype, nccl=Nccl(way))
            found[f"{dtype} {way.__name__}"] = most, said, summed(held, dtype)
    small = OneStage()
    small.max_size = MOST * 2
    off, several = OneStage(), OneStage()
    off.disabled, several.mnnvl_only = bool(rank), True
    for name, own in {"within the buffer": small, "off on one rank": off, "several nodes": several}.items():
        found[name] = certified(torch.bfloat16, own)[:2]
    missing = Nccl()
    missing.disabled = bool(rank)  # vLLM could load NCCL on one rank only
    found["no NCCL on one rank"] = certified(torch.bfloat16, nccl=missing)[:2]
    found["gloo"] = certified(torch.bfloat16, nccl=missing, group=dist.group.WORLD)[:2]
    dist.Backend.NCCL = dist.Backend.GLOO  # a group of a build for CPU
    most, said, held = certified(torch.bfloat16, nccl=missing, group=dist.group.WORLD)
    found["by PyTorch"] = most, said, summed(held, torch.bfloat16)
    try:
        certified(torch.bfloat16, nccl=Nccl(failing))
        found["failing"] = "went on"
    except RuntimeError as error:
        found["failing"] = str(error)
    room = adder._room
    adder._room = lambda size, device: room(size << 40 if rank else size, device)
    found["no memory on one rank"] = certified(torch.bfloat16)[:2]
    adder._room = room
    found["fp64"] = certified(torch.float64)[:2]
    print(json.dumps(found))
    dist.barrier()  # a rank that leaves while the other one still talks to it can end both
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
