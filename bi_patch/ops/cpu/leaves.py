"""Row-parallel linears whose bits do not depend on the number of ranks: K in fixed parts, added in a fixed tree.

Order of one output: K is cut into L equal parts (leaves), L a power of two. The bundled GEMM gives the sum of each leaf
in fp32 (kernels/cpu/README.md). Leaves are added in pairs, then pairs of pairs, and so on, in fp32; then the bias is
added and the result is rounded once. A rank of n owns L / n leaves side by side, which are a whole subtree, so each
rank adds its subtree, and every rank adds the roots of all ranks in the same tree. One rank adds the whole tree.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bi_patch.errors import CertificateFailed
from bi_patch.ops.cpu import machine
from bi_patch.ops.registration import define

if TYPE_CHECKING:
    import torch

# (out fp32 [ranks, rows, N], own fp32 [rows, N]) -> None: fills `out` with the roots of all ranks, in rank order.
Gather = Callable[["torch.Tensor", "torch.Tensor"], object]

_layers: dict[int, RowParallel] = {}  # by handle
_handles = itertools.count()


@dataclass
class RowParallel:
    """One rank's part of a layer.

    packed: the rank's leaves of the weight, each [n, k]. bias: [n] or None. ranks: how many ranks share the layer.
    """

    packed: list[torch.Tensor]
    n: int
    k: int
    bias: torch.Tensor | None
    ranks: int
    gather: Gather

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K / ranks] -> [..., N], the whole sum over K, on every rank."""
        import torch

        rows = x.reshape(-1, self.k * len(self.packed))
        total = tree(
            torch.ops.bi_cpu.gemm_sums(rows[:, i * self.k : (i + 1) * self.k], packed, self.n, self.k)
            for i, packed in enumerate(self.packed)
        )
        if self.ranks > 1:
            roots = torch.empty((self.ranks, *total.shape), dtype=total.dtype, device=total.device)
            self.gather(roots, total)
            total = tree(roots.unbind())
        if self.bias is not None:
            total = total + self.bias.float()
        return total.to(x.dtype).view(*x.shape[:-1], self.n)


def tree(leaves: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of a power of two of tensors: of neighbours, then of neighbouring pairs, and so on."""
    held: list[torch.Tensor] = []
    for i, leaf in enumerate(leaves):
        node = leaf
        while i % 2:  # as many times as the number of leaves so far can be halved
            node = held.pop() + node
            i //= 2
        held.append(node)
    (root,) = held
    return root


def route(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    leaves: int,
    ranks: int,
    gather: Gather,
    layer: torch.nn.Module,
    cache: Path,
) -> Callable[..., torch.Tensor]:
    """One rank's part of a row-parallel layer, as a function (x [..., K / ranks], weight, bias) -> [..., N].

    weight: [N, K / ranks]. bias: [N], or None. leaves: the leaves of the whole K; `ranks` divides them, and they divide
    K. layer: the function lives as long. The function ignores its second and third arguments. Raises CertificateFailed
    if the bundled kernels cannot be built.
    """
    import torch

    machine.load_kernels(cache)
    own = leaves // ranks
    n, k = weight.shape[0], weight.shape[1] // own
    packed = [torch.ops.bi_cpu.gemm_pack(part.contiguous()) for part in weight.split(k, dim=1)]
    made = RowParallel(packed, n, k, bias, ranks, gather)
    handle = next(_handles)
    _layers[handle] = made
    weakref.finalize(layer, _layers.pop, handle, None)
    define(
        "cpu_leaves(Tensor x, Tensor number, int n) -> Tensor",
        _run,
        "CPU",
        lambda x, number, n: x.new_empty((*x.shape[:-1], n)),
    )
    number = torch.tensor(handle, device="cpu")  # a tensor, not a part of compiled code: see ops/cpu/linear.py

    def apply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.bi_patch.cpu_leaves(x, number, n)

    return apply


def _run(x: torch.Tensor, number: torch.Tensor, n: int) -> torch.Tensor:
    held = _layers.get(number.item())
    if held is None or (held.n, held.k * len(held.packed)) != (n, x.shape[-1]):
        raise CertificateFailed(
            f"cpu.leaves: compiled code asks for a layer N={n} K={x.shape[-1]} that its model does not have. Delete "
            "vLLM's compile cache, and start the engine again"
        )
    return held(x)
