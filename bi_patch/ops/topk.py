"""Top-k whose ties are broken by the lower index, on any device.

Libraries pick a top-k algorithm by the number of rows, and each breaks ties in its own way; logits rounded to bf16 tie
often. Here every key is unique, so every algorithm must give the same answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


# Values handled at once: the 64-bit keys of more would take memory from the KV cache.
_PIECE = 1 << 23


class TopK(NamedTuple):
    values: torch.Tensor
    indices: torch.Tensor


def topk(values: torch.Tensor, k: int, dim: int = -1) -> TopK:
    """The k largest of values [..., V] (fp32, fp16 or bf16; V < 2**31) along the last dimension, largest first.

    Equal values (also -0.0 and 0.0) come in ascending order of index. A NaN counts as the largest value.
    """
    import torch

    if dim not in (-1, values.dim() - 1):
        raise ValueError("topk: only the last dimension")
    if values.dim() == 2 and values.shape[0] > (rows := max(1, _PIECE // values.shape[1])):
        pieces = [topk(piece, k) for piece in values.split(rows)]
        return TopK(torch.cat([p.values for p in pieces]), torch.cat([p.indices for p in pieces]))
    # + 0.0 turns -0.0 into 0.0, so that the two tie as floats do.
    bits = (values.to(torch.float32) + 0.0).view(torch.int32)
    # Order-preserving: negative floats have their magnitude bits flipped.
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    keys <<= 32
    keys |= 0xFFFFFFFF - torch.arange(values.shape[-1], device=values.device, dtype=torch.int64)
    best = torch.topk(keys, k, dim=-1).values
    indices = 0xFFFFFFFF - (best & 0xFFFFFFFF)
    return TopK(values.gather(-1, indices), indices)
