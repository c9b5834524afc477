"""LoRA on CPU by the bundled kernel: each row's adapter in the order of the bundled GEMM, in any company.

Order of a row: t = x A^T, rounded; d = t B^T, rounded; y + d, rounded (kernels/cpu/README.md). vLLM's own code has
these roundings, too. A row without an adapter is not touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bi_patch.errors import UnsupportedFeature
from bi_patch.ops.registration import define

if TYPE_CHECKING:
    import torch


def add(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor, slots: torch.Tensor) -> None:
    """Add each row's adapter to y [rows, N] in place. y's columns are dense, its rows may be strided.

    x: [rows, K]; [rows, rank] without a. a: [slots, 1, rank, K] or None. b: [slots, 1, N, rank]. slots: int64 [rows],
    negative for a row without an adapter; it may be shorter than y, whose other rows are padding.
    y, x, a and b have one dtype of bf16, fp16 and fp32. Raises UnsupportedFeature for other dtypes.
    """
    import torch

    kinds = {held.dtype for held in (y, x, a, b) if held is not None}
    if len(kinds) != 1:
        raise UnsupportedFeature(
            f"lora.cpu: an adapter's product of {', '.join(sorted(map(str, kinds)))} has no order. Use adapters of the "
            "model's type (--lora-dtype auto)"
        )
    rows = slots.shape[0]
    if y.shape[1] < b.shape[-2]:  # a padded vocabulary
        b = b[..., : y.shape[1], :]
    stack_a, stack_b = None if a is None else a.flatten(0, -3), b.flatten(0, -3)
    packed, ranks = _packed(a, b, stack_a, stack_b)
    torch.ops.bi_cpu.lora(y[:rows, : b.shape[-2]], x[:rows], stack_a, stack_b, slots, packed, ranks)


_PACKED = "_bi_patch_packed"  # attribute of a stack b: what `_packed` keeps


def _packed(a, b, stack_a, stack_b) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The packed weights of two stacks, and the rank of each slot that is packed. A written stack is packed again.

    None for stacks that PyTorch keeps no count of writes for: their weights are packed in each call.
    """
    import torch

    if b.is_inference() or (a is not None and a.is_inference()):
        return None, None
    version = (None if a is None else a._version, b._version)
    held = getattr(b, _PACKED, None)
    if held is None or held[0] is not a:
        room = torch.ops.bi_cpu.lora_room(stack_a, stack_b)
        slots = stack_b.shape[0]
        held = [a, version, b.new_empty(slots, room), torch.full((slots,), -1)]
        setattr(b, _PACKED, held)
    if held[1] != version:
        held[1] = version
        held[3].fill_(-1)
    return held[2], held[3]


def embed(y: torch.Tensor, ids: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: torch.Tensor) -> None:
    """Add each token's adapter to its embedding y [tokens, N] in place.

    ids: int64 [tokens]. a: [slots, vocabulary, rank], the row of a token is its t. b, slots: as in `add`.
    """
    import torch

    define(
        "cpu_lora_embedding(Tensor(a!) y, Tensor ids, Tensor a, Tensor b, Tensor slots) -> ()",
        _embed,
        "CPU",
        lambda y, ids, a, b, slots: None,
    )
    torch.ops.bi_patch.cpu_lora_embedding(y, ids, a, b, slots)


def _embed(y: torch.Tensor, ids: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: torch.Tensor) -> None:
    # One operator: the rows of `a` lie where the adapter's slot is, and a slot says nothing about a request.
    ids = ids[: slots.shape[0]]
    add(y, a[slots.clamp_min(0), ids], None, b, slots)
