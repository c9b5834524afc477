"""Top-k in which the lower index wins a tie, on any device.

Libraries pick a top-k algorithm by the number of rows, and each algorithm breaks ties in its own way. Logits rounded to
bf16 tie often. Here each value and its index form one unique key, so every algorithm gives the same result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


# At most so many values are handled at once. The 64-bit keys of more values would take memory from the KV cache.
_PIECE = 1 << 23


class TopK(NamedTuple):
    values: torch.Tensor
    indices: torch.Tensor


def topk(values: torch.Tensor, k: int, dim: int = -1) -> TopK:
    """The k largest of values [..., V] (fp32, fp16 or bf16; V < 2**31) along the last dimension, largest first.

    Returns values [..., k] of the same dtype and indices [..., k] (int64). Equal values come in ascending order of
    index; -0.0 equals 0.0. A positive NaN counts as the largest value. Raises ValueError for another dimension.
    """
    import torch

    if dim not in (-1, values.dim() - 1):
        raise ValueError("topk works along the last dimension only")
    if values.dim() == 2 and values.shape[0] > (rows := max(1, _PIECE // values.shape[1])):
        pieces = [topk(piece, k) for piece in values.split(rows)]
        return TopK(torch.cat([p.values for p in pieces]), torch.cat([p.indices for p in pieces]))
    # + 0.0 turns -0.0 into 0.0, so that the two tie.
    bits = (values.to(torch.float32) + 0.0).view(torch.int32)
    # Flip the magnitude bits of negative floats: then the integers are ordered as the floats are.
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    keys <<= 32
    keys |= 0xFFFFFFFF - torch.arange(values.shape[-1], device=values.device, dtype=torch.int64)
    best = torch.topk(keys, k, dim=-1).values
    indices = 0xFFFFFFFF - (best & 0xFFFFFFFF)
    return TopK(values.gather(-1, indices), indices)
