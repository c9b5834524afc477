"""Row-parallel linears on CUDA whose bits do not depend on the number of ranks (kernels/triton/leaves.py).

Each rank computes the root of its subtree in fp32. Two roots are added by the sum over ranks; of more ranks, every rank
gathers the roots and adds them in the tree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bi_patch.errors import CertificateFailed
from bi_patch.ops.cuda import linear
from bi_patch.ops.registration import define

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ranks:
    """How roots reach all ranks. add: fp32 x -> the sum of two ranks' x. gather: (out [ranks, n], x [n]) -> None."""

    add: Callable[[torch.Tensor], torch.Tensor]
    gather: Callable[[torch.Tensor, torch.Tensor], object]


_ranks: Ranks | None = None


def connect(ranks: Ranks) -> None:
    """Say how this process reaches the other ranks. Call before the model runs."""
    global _ranks
    _ranks = ranks


def define_op() -> None:
    """Define torch.ops.bi_patch.row_parallel. A second call does nothing."""
    define(
        "row_parallel(Tensor x, Tensor weight, Tensor? bias, int leaves, int ranks) -> Tensor",
        row_parallel,
        "CUDA",
        lambda x, weight, bias, leaves, ranks: x.new_empty((*x.shape[:-1], weight.shape[0])),
    )


def row_parallel(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, leaves: int, ranks: int
) -> torch.Tensor:
    """x [..., K / ranks] @ weight [N, K / ranks].T, over all ranks, + bias [N] -> [..., N], on every rank.

    leaves: of this rank's part of K. The weight is packed (linear.packed), which is checked once, when the model is
    loaded. Raises CertificateFailed if the dtypes differ, and if no ranks are connected.
    """
    import torch

    from bi_patch.kernels.triton import leaves as kernels

    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype:
        raise CertificateFailed(f"cuda.leaves: no product of {x.dtype} rows and {weight.dtype} weights")
    flat = x.reshape(-1, x.shape[-1])
    if not linear.packed(flat, flat.shape[1]):
        flat = flat.clone(memory_format=torch.contiguous_format)
    if ranks == 1:
        return kernels.product(flat, weight, bias, leaves, x.dtype).view(*x.shape[:-1], weight.shape[0])
    if _ranks is None:
        raise CertificateFailed("cuda.leaves: the process has no other ranks")
    root = kernels.product(flat, weight, None, leaves, torch.float32)
    if ranks == 2:
        roots = _ranks.add(root)[None]
    else:
        roots = torch.empty((ranks, *root.shape), dtype=root.dtype, device=root.device)
        _ranks.gather(roots.view(ranks, -1), root.view(-1))
    return kernels.tree(roots, bias, x.dtype).view(*x.shape[:-1], weight.shape[0])
