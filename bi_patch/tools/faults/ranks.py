"""Other sums over ranks, planted in every worker of an engine of several ranks, below the patch point.

The patch point communicator.cpu_sum gathers the parts and adds them; on CUDA, a bundled kernel adds what NCCL carries
(communicator.cuda_sum, communicator.cuda_scatterv). Each of WAYS adds the parts as a library does that looks at the
message: causes 14 and 16 with real ranks. SLICES and OF_TWO, on CUDA, add what a rank keeps of a sum, and may look at
the rank.
TREES are other sums of the parts of BI_PATCH_TP_INVARIANT, which the axis "tensor parallel size" finds. The layers are
in other processes, so verify's axis finds the difference, and nothing names the layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import msgspec
import torch

from bi_patch.seams import active
from bi_patch.tools.verify.engine import LocalEngine

Sum = Callable[[torch.Tensor], torch.Tensor]
_own: dict[str, Callable] = {}  # what the patch points call, by name
_SMALL = 8192  # bytes: messages up to this size are added in rank order


def _added(parts: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(dtype)


def two_shot(parts: torch.Tensor) -> torch.Tensor:
    """Large messages are added in slices: the sum of slice r starts with rank r's part."""
    if parts[0].nbytes <= _SMALL:
        return _added(list(parts), parts.dtype)
    ranks = parts.shape[0]
    slices = [part.flatten().tensor_split(ranks) for part in parts]
    done = [_added([slices[(r + i) % ranks][r] for i in range(ranks)], parts.dtype) for r in range(ranks)]
    return torch.cat(done).view(parts.shape[1:])


def by_size(parts: torch.Tensor) -> torch.Tensor:
    """Small messages are added in a tree, large ones from the last rank to the first, as NCCL changes its algorithm."""
    if parts[0].nbytes > _SMALL:
        return _added(list(parts.flip(0)), parts.dtype)
    pairs = [_added(list(pair), torch.float32) for pair in parts.split(2)]
    return _added(pairs, parts.dtype)


def by_arrival(parts: torch.Tensor) -> torch.Tensor:
    """The parts are added as they arrive, in another order in each call."""
    return _added([parts[i] for i in torch.randperm(parts.shape[0])], parts.dtype)


WAYS: dict[str, Sum] = {
    "two-shot rotated by rank": two_shot,
    "NCCL switch by size": by_size,
    "combine by arrival": by_arrival,
}


def _hops(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Parts added as in a ring: every hop rounds. In fp32, four parts of 16 bits mostly have one sum in any order."""
    return functools.reduce(torch.add, parts)


def from_the_owner(parts: torch.Tensor, rank: int) -> torch.Tensor:
    """A slice of experts' rows is added from the part of the rank on that keeps the slice."""
    return _hops(parts.roll(-rank, 0))


def small_from_the_owner(parts: torch.Tensor, rank: int) -> torch.Tensor:
    """Small slices are added in rank order, large ones from their owner's part on."""
    return _hops(parts) if parts[0].nbytes <= _SMALL else from_the_owner(parts, rank)


def slices_by_arrival(parts: torch.Tensor, rank: int) -> torch.Tensor:
    """The parts of a slice are added as they arrive, in another order in each call."""
    return _hops(parts[i] for i in torch.randperm(parts.shape[0]))


SLICES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "combine rotated by rank": from_the_owner,
    "combine rotated by rank for many rows": small_from_the_owner,
    "combine by arrival, each hop rounded": slices_by_arrival,
}


def in_eight_bits(parts: torch.Tensor, rank: int) -> torch.Tensor:
    """The parts of a large slice travel in 8 bits, as a library quantizes messages above a size."""
    return _hops(parts if parts[0].nbytes <= _SMALL else parts.to(torch.float8_e4m3fn).to(parts.dtype))


# What two ranks show, too: their sum has one order only.
OF_TWO = {"many rows carried in 8 bits": in_eight_bits}


def shown_by(several: int) -> tuple[str, ...]:
    """The names of SLICES and OF_TWO that change a sum over so many ranks."""
    return (*(SLICES if several > 2 else ()), *OF_TWO)


def one_by_one(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """The parts of K are added one after the other, so the number of ranks decides where a sum begins anew."""
    return functools.reduce(torch.add, parts)


TREES: dict[str, Callable[[Iterable[torch.Tensor]], torch.Tensor]] = {"parts of K added one by one": one_by_one}


def plant(engine: LocalEngine, data: bytes) -> bytes:
    """Instrument: plant one of WAYS or TREES in every worker, "" removes it. Returns the number of workers."""
    name = msgspec.msgpack.decode(data, type=str)
    # Not by llm.collective_rpc, which may write weights, so that engines with BI_PATCH_TP_INVARIANT refuse it.
    done = engine.core.model_executor.collective_rpc(functools.partial(put, name=name))
    return msgspec.msgpack.encode(len(done))


def put(worker: object, name: str) -> bool:
    """In a worker: let the patch points add in one of SLICES or OF_TWO on CUDA, of WAYS or TREES on CPU."""
    for module, attribute, ways in _cuda() if active.plan and active.plan.platform == "cuda" else _cpu():
        own = _own.setdefault(attribute, getattr(module, attribute))
        setattr(module, attribute, ways.get(name, own))
    return True


def _cpu():
    from bi_patch.ops import collectives
    from bi_patch.ops.cpu import leaves

    return (collectives, "in_rank_order", WAYS), (leaves, "tree", TREES)


def _cuda():
    from vllm.distributed.parallel_state import get_dp_group

    from bi_patch.kernels.triton import ranks

    own = get_dp_group().rank_in_group
    ways = {name: functools.partial(way, rank=own) for name, way in (SLICES | OF_TWO).items()}
    return ((ranks, "rank_sum", ways),)
