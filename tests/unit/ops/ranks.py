"""One of several ranks, as a program: `ranks.py RANK RANKS FOLDER` prints what `collectives.moved` finds, as JSON."""

import json
import sys

import torch
import torch.distributed as dist

from bi_patch.ops import collectives

WIDTH, MOST = 96, 40


def gathered(tensor):
    """The ranks' tensors, in rank order."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


def added(parts, dtype):
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total = total + part.float()
    return total.to(dtype)


def in_rank_order(tensor):
    return added(gathered(tensor), tensor.dtype)


def like_a_ring(tensor):
    """Each chunk of the message starts at a rank of its own, as in a ring."""
    parts = [part.flatten() for part in gathered(tensor)]
    ranks = len(parts)
    chunks = [part.chunk(ranks) for part in parts]
    done = [added([chunks[(r + c) % ranks][c] for r in range(ranks)], tensor.dtype) for c in range(len(chunks[0]))]
    return torch.cat(done).view_as(tensor)


def by_size(tensor):
    """Large messages are added from the last rank to the first."""
    parts = gathered(tensor)
    return added(parts[::-1] if tensor.numel() > 16 * WIDTH else parts, tensor.dtype)


def of_gloo(tensor):
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def of_the_cpu_seam(tensor):
    """vLLM's CPU communicator over gloo, with the patch point closed."""
    from types import SimpleNamespace

    from bi_patch.seams.cpu.communicator import SEAMS

    close = next(seam.close for seam in SEAMS if seam.name == "communicator.cpu_sum")
    held = SimpleNamespace(
        world_size=dist.get_world_size(), supports_tensor_dict=False, dist_module=dist, device_group=None
    )
    return close(of_gloo)(held, tensor)


class Nccl:
    """As vLLM's PyNcclCommunicator, over gloo."""

    disabled = False

    def __init__(self):
        self.rank, self.world_size, self.asked = dist.get_rank(), dist.get_world_size(), []

    def all_gather(self, out, x):
        dist.all_gather_into_tensor(out.view(-1), x.reshape(-1))

    def group_start(self):
        self.asked = []

    def send(self, x, other):
        self.asked.append(dist.P2POp(dist.isend, x.contiguous(), other))

    def recv(self, out, other):
        self.asked.append(dist.P2POp(dist.irecv, out, other))

    def group_end(self):
        for done in dist.batch_isend_irecv(self.asked):
            done.wait()


def _of_cuda(tensor, nccl):
    """vLLM's CUDA communicator without peer memory, with the patch point closed: messages above 16 rows are two-shot.

    The bundled kernel needs a GPU; its own test compares it with this sum.
    """
    from bi_patch.ops.cuda import ranks as ops

    ops.LARGE = 16 * WIDTH * tensor.element_size()
    return _closed("communicator.cuda_sum")(_communicator(nccl), tensor)


def _closed(name):
    from types import SimpleNamespace

    from bi_patch.seams.cuda.communicator import SEAMS

    sys.modules["bi_patch.kernels.triton.ranks"] = SimpleNamespace(rank_sum=collectives.in_rank_order)
    return next(seam.close for seam in SEAMS if seam.name == name)(of_gloo)


def _communicator(nccl):
    from types import SimpleNamespace

    held = SimpleNamespace(world_size=dist.get_world_size(), rank_in_group=dist.get_rank())
    held.ca_comm = held.device_group = None
    held.pynccl_comm = nccl
    return held


def of_the_cuda_seam(tensor):
    return _of_cuda(tensor, Nccl())


def of_the_cuda_seam_by_torch(tensor):
    return _of_cuda(tensor, None)


def slices_of_the_cuda_seam(rows, sizes):
    return _closed("communicator.cuda_scatterv")(_communicator(Nccl()), rows, 0, sizes)


def slices_of_the_cuda_seam_by_torch(rows, sizes):
    return _closed("communicator.cuda_scatterv")(_communicator(None), rows, 0, sizes)


def slices_from_the_owner(rows, sizes):
    """The sum of a slice starts with the part of the rank that keeps the slice."""
    parts = [part.split(sizes)[dist.get_rank()] for part in gathered(rows)]
    return added(parts[dist.get_rank() :] + parts[: dist.get_rank()], rows.dtype)


def empty_slices():
    """Whether ranks that keep nothing leave the others' slices as they are."""
    rows = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank())).bfloat16()
    sizes = [2, 0, 1, 0]
    want = in_rank_order(rows).split(sizes)[dist.get_rank()]
    return all(torch.equal(way(rows, sizes), want) for way in SLICES[:2])


def gathered_rows(sizes):
    """Whether every rank gets the rows of all, with PyTorch's collectives in place of vLLM's own."""
    every = torch.randn(sum(sizes), WIDTH, generator=torch.Generator().manual_seed(7)).bfloat16()
    own, ids = every.split(sizes)[dist.get_rank()], torch.arange(sum(sizes)).split(sizes)[dist.get_rank()]
    rows, numbers = _closed("communicator.cuda_gatherv")(_communicator(None), [own, ids], 0, sizes)
    return torch.equal(rows, every) and numbers.tolist() == list(range(sum(sizes)))


SLICES = (slices_of_the_cuda_seam, slices_of_the_cuda_seam_by_torch, slices_from_the_owner)
WAYS = (in_rank_order, like_a_ring, by_size, of_gloo, of_the_cpu_seam, of_the_cuda_seam, of_the_cuda_seam_by_torch)


def main(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found = {
        f"{way.__name__} {str(dtype).removeprefix('torch.')}{' by rank' * ordered}": collectives.moved(
            way,
            rank=rank,
            ranks=ranks,
            width=WIDTH,
            most=MOST,
            dtype=dtype,
            device="cpu",
            ordered=ordered,
        )
        for ordered in (False, True)
        for way in WAYS
        for dtype in (torch.bfloat16, torch.float32)
    }
    given = {"rank": rank, "ranks": ranks, "width": WIDTH, "most": MOST, "device": "cpu"}
    for way in SLICES:
        found[way.__name__] = collectives.moved_slices(way, dtype=torch.bfloat16, **given)
    found["empty slices"] = empty_slices()
    found["gathered rows"] = all(gathered_rows(sizes) for sizes in ([3, 3, 3, 3], [1, 0, 5, 2]))
    print(json.dumps(found))
    dist.barrier()  # a rank that leaves while another still talks to it can end both
    dist.destroy_process_group()  # gloo's threads end here, not while Python ends


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
