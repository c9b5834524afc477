"""A fault of experts of 4 bits on bi_patch's kernel: sums over K in parts for few tokens, as of kernels that cut K."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bi_patch.tools.faults.base import CUDA, FEW, PACKED_EXPERTS, Fault
from bi_patch.tools.verify.engine import LocalEngine
from bi_patch.tools.verify.runner import replaced

FEW_IDS = 8 * FEW  # of few tokens, each with eight experts
_PARTS = 4
_arrival = torch.Generator().manual_seed(27)  # when a part is ready: another order each time, the same in each run


def atomic_experts(engine: LocalEngine):
    """The parts of K of an expert's product for few tokens are added in the order in which they are ready, as atomics
    do."""
    from bi_patch.ops.cuda import packed_experts

    def wrap(held):
        def product(x, packed, rows, bias, form, out):
            if rows.ids > FEW_IDS:
                return held(x, packed, rows, bias, form, out)
            for ids, expert in _tiles(rows, form):
                if expert < 0:
                    out[ids] = 0
                    continue
                total = _added(x[ids // rows.each], _one(packed, expert))
                if bias is not None:
                    total += bias[expert]
                if rows.weights is not None:
                    total *= rows.weights[ids, None]
                out[ids] = total.to(out.dtype)

        return product

    return replaced(packed_experts, "product", wrap)


def _tiles(rows, form) -> Iterator[tuple[torch.Tensor, int]]:
    """(ids, their expert) of each tile, as kernels.cuda.packed.Rows has them. An eager engine may read the device."""
    tiles = rows.sorted_ids[: int(rows.padded)].view(-1, 8 * form.tiles).long()
    for ids, expert in zip(tiles, rows.experts.tolist(), strict=False):
        yield ids[ids < rows.ids], expert


def _one(packed, expert: int):
    """The weights of one expert, packed."""
    data = packed.data.view(len(packed.scale), -1)[expert]
    zero = None if packed.zero is None else packed.zero[expert]
    return packed._replace(data=data, scale=packed.scale[expert], zero=zero)


def _added(x: torch.Tensor, packed) -> torch.Tensor:
    """x [M, K] times weights, in fp32: a sum of parts of K in an order of their own."""
    from bi_patch.ops.cuda import packed_linear

    weights = packed_linear.dequantize(packed)[:, : x.shape[1]]  # K of floats is filled up
    halves = zip(x.chunk(_PARTS, 1), weights.chunk(_PARTS, 1), strict=True)
    made = [a.float() @ b.float().T for a, b in halves]
    first, *rest = (made[i] for i in torch.randperm(_PARTS, generator=_arrival).tolist())
    for part in rest:
        first = first + part
    return first


FAULTS = (
    Fault(
        "parts of K of packed experts added as they arrive",
        10,
        atomic_experts.__doc__,
        "batch size",
        atomic_experts,
        (CUDA,),
        "mlp.experts",
        seam={"cuda": "packed_products.cuda_kernel"},
        emulated=(CUDA,),
        model=PACKED_EXPERTS,
    ),
)
