"""NCCL adds large messages of two ranks, where a certificate shows the bits of vLLM's one-stage all-reduce.

That all-reduce copies a message into a buffer of peer memory, and takes a message that exceeds the buffer in pieces,
one launch after the other. Two parts have one sum, whatever carries them. So NCCL may add such messages in its own way:
vLLM's own NCCL, or PyTorch's where vLLM could not load one, as in stock vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from bi_patch.platforms.features.variables import switched
from bi_patch.seams import agreement, ranks

_log = logging.getLogger("vllm.bi_patch")
_ADDER = "_bi_patch_adder"  # attribute of vLLM's CudaCommunicator
_PARTS = 2  # ranks
_MESSAGES = 6  # a message, two sums, and what compares them
Way = Callable[[Any], Any]  # x -> its sum over the ranks, as a new tensor
# NCCL could let the switch add messages in memory of this kind.
_SYMMETRIC = "VLLM_USE_NCCL_SYMM_MEM"


def adder(communicator: Any) -> Any:
    """The Adder of vLLM's CudaCommunicator, None without a certificate."""
    return communicator.__dict__.get(_ADDER)


def certify(config: Any, group: Any, carrier: Callable[[], Any]) -> None:
    """Make the certificates of two ranks, at the start of each. Both go on in one way.

    config: VllmConfig. group: vLLM's group of tensor-parallel ranks. carrier: returns the Carrier of its
    communicator.
    """
    from bi_patch.ops.cuda.ranks import Adder

    if group.world_size != _PARTS:
        return
    communicator = group.device_communicator
    for make in (_by_vllm, _by_torch):
        add = make(communicator)
        if agreement.every(group, add is not None):
            break
    else:
        return
    own, carries = communicator.ca_comm, carrier()
    most, failed = {}, []
    for dtype, lengths in _lengths(config, own.max_size).items():
        # A rank without room in the middle of the check would let the other one wait.
        if not agreement.every(group, _room(lengths[-1] * dtype.itemsize, group.device)):
            failed.append("no memory for the check on a rank")
            continue
        reason = _differing(add, own, carries, group, dtype, lengths)
        if agreement.every(group, not reason):
            most[dtype] = lengths[-1] * dtype.itemsize
        else:
            failed.append(reason or "the other rank said so")
    if failed:
        _log.warning(
            "bi_patch: the certificate of NCCL's sum of two ranks failed (%s); vLLM's one-stage all-reduce serves "
            "instead, in pieces",
            ", ".join(failed),
        )
    setattr(communicator, _ADDER, Adder(add, most) if most else None)


def _by_vllm(communicator: Any) -> Way | None:
    nccl = getattr(communicator, "pynccl_comm", None)
    return nccl.all_reduce if _in_pieces(communicator) and nccl is not None and not nccl.disabled else None


def _by_torch(communicator: Any) -> Way | None:
    import torch.distributed as dist

    group = getattr(communicator, "device_group", None)
    if not _in_pieces(communicator) or group is None or dist.get_backend(group) != dist.Backend.NCCL:
        return None

    def add(x: Any) -> Any:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    return add


def _in_pieces(communicator: Any) -> bool:
    """Whether the one-stage all-reduce serves, in pieces of its buffer, and the switch adds nothing for NCCL."""
    own = getattr(communicator, "ca_comm", None)
    if own is None or own.disabled or switched(_SYMMETRIC):
        return False
    return not getattr(own, "mnnvl_only", True)  # several nodes


def _lengths(config: Any, piece: int) -> dict[Any, list[int]]:
    """For each dtype of a message: numbers of elements above `piece` bytes, up to the largest step, ascending."""
    import torch

    from bi_patch.ops.collectives import LARGEST

    found: dict[Any, list[int]] = {}
    for width, rows, dtype in ranks.messages(config, True):
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            continue
        least, most = piece // dtype.itemsize, min(width * rows, LARGEST // dtype.itemsize)
        if most <= least:
            continue
        doubled = [least << k for k in range(most.bit_length()) if least << k <= most]
        lengths = {n for n in (*doubled, *(n + 1 for n in doubled), most - 1, most) if least < n <= most}
        found[dtype] = sorted(lengths | set(found.get(dtype, ())))
    return found


def _room(size: int, device: Any) -> bool:
    """Whether this rank has memory for the check of a message of `size` bytes."""
    import torch

    try:
        torch.empty(_MESSAGES * size, dtype=torch.uint8, device=device)
    except Exception:  # torch raises several kinds
        return False
    return True


def _differing(add: Any, own: Any, carrier: Any, group: Any, dtype: Any, lengths: list[int]) -> str:
    """What this rank found, "" for equal bits. Ranks exchange messages: an error stops them."""
    from bi_patch.ops import collectives
    from bi_patch.ops.cuda.ranks import all_reduce

    length = collectives.unlike(
        add,
        lambda x: all_reduce(x, own, carrier),
        rank=group.rank_in_group,
        lengths=lengths,
        dtype=dtype,
        device=group.device,
    )
    return "" if length is None else f"{length} elements in {str(dtype).removeprefix('torch.')}"
