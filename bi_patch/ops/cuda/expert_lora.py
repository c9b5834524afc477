"""LoRA of experts on CUDA by the bundled Triton kernels: each row's adapter in one order, whatever the batch holds.

The order is in kernels/triton/expert_lora.py. Its tiles are fixed, so there is no certificate.
"""

from __future__ import annotations

from bi_patch.errors import UnsupportedFeature
from bi_patch.ops.registration import define


def register() -> None:
    """Define torch.ops.bi_patch.cuda_expert_lora. Compiled code calls `add`, and cannot define an operator itself."""
    define(
        "cuda_expert_lora(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, Tensor? rows, Tensor experts, "
        "Tensor? padded, Tensor mapping, Tensor slots, Tensor enabled, Tensor active, Tensor? weights, int top_k) "
        "-> ()",
        _run,
        "CUDA",
        lambda *args: None,
    )


def rows_of_a_block() -> int:
    """How many rows a block of sorted rows has."""
    from bi_patch.kernels.triton import expert_lora

    return expert_lora.BLOCK_M


def add(y, x, a, b, rows, experts, padded, mapping, slots, enabled, active, weights, top_k: int) -> None:
    """Add each row's adapter to y [rows, columns] in place, in compiled code too. Call `register` first.

    x: [tokens, K] or [rows, K], row i is of token i // top_k. a, b: for one or two slices of y the stacks [slots,
    experts, rank, K] and [slots, experts, columns, rank]. rows, experts, padded, mapping, slots, enabled: as in
    kernels.triton.expert_lora.Blocks. active: int32 on the host. weights: fp32 [tokens, top_k], which multiply d, or
    None. y, x, a and b are bf16 or fp16. Raises UnsupportedFeature for other dtypes and for slices of several shapes.
    """
    import torch

    torch.ops.bi_patch.cuda_expert_lora(
        y, x, list(a), list(b), rows, experts, padded, mapping, slots, enabled, active, weights, top_k
    )


def _run(y, x, a, b, rows, experts, padded, mapping, slots, enabled, active, weights, top_k) -> None:
    import torch

    from bi_patch.kernels.triton import expert_lora

    kinds = {held.dtype for held in (y, x, *a, *b)}
    if len(kinds) != 1 or kinds.isdisjoint((torch.bfloat16, torch.float16)):
        raise UnsupportedFeature(
            f"expert_lora.cuda: an adapter's product of {', '.join(sorted(map(str, kinds)))} has no order. Use bf16 or "
            "fp16, and adapters of the model's type (--lora-dtype auto)"
        )
    for held in (a, b):
        if len(held) > 2 or len({(part.shape, part.stride()) for part in held}) != 1 or not held[0].is_contiguous():
            raise UnsupportedFeature(
                "expert_lora.cuda: a layer's slices have adapters of several shapes. Set BI_PATCH=0"
            )
    if not len(x):
        return
    blocks = expert_lora.Blocks(rows, experts, padded, mapping, slots, enabled, int(active.item()))
    given = None if weights is None else weights.float().reshape(-1)
    expert_lora.expert_lora(y, x.contiguous(), a, b, blocks, given, top_k)
