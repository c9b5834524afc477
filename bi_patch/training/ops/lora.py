"""A LoRA adapter beside a linear layer, in the order of the sampler on CPU (bi_patch.ops.cpu.lora)."""

from __future__ import annotations

import torch

from bi_patch.training.ops.linear import linear


def lora(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """y [..., N] + (x [..., K] @ a [rank, K].T) @ (b [N, rank] * scaling).T, each product rounded to x's dtype."""
    return y + linear(linear(x, a), scaled(b, x.dtype, scaling))


def scaled(b: torch.Tensor, dtype: torch.dtype, scaling: float) -> torch.Tensor:
    """b as vLLM keeps it: rounded to `dtype`, multiplied by the adapter's scaling, and rounded again."""
    held = b.to(dtype)
    return held if scaling == 1 else held * scaling
