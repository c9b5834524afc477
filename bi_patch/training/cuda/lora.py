"""LoRA adapters on CUDA by the sampler's kernels, with all rows in one slot."""

from __future__ import annotations

import torch

from bi_patch.errors import UnsupportedFeature
from bi_patch.kernels.triton import lora as kernel
from bi_patch.training.adapters import scaled


def cover(dtype: torch.dtype) -> None:
    """Raise UnsupportedFeature for a dtype of rows whose adapters have no cover."""
    if dtype != torch.bfloat16:
        raise UnsupportedFeature(
            f"training.lora: on CUDA, a trainer's adapters were compared with a sampler in torch.bfloat16, not in "
            f"{dtype}. Use bfloat16, or merge the adapter"
        )


def lora(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """As bi_patch.training.cpu.lora, which states the shapes, in the order of kernels/triton/lora.py.

    The sampler's stacks hold more ranks, whose weights are zero, so they change no bit.
    """
    out = y.clone(memory_format=torch.contiguous_format)
    rows, rank = len(x), len(a)
    if not rows:
        return out
    of_a, of_b = a.to(x.dtype).contiguous(), scaled(b, x.dtype, scaling).contiguous()

    def number(value):
        return torch.tensor([value], dtype=torch.int32, device=x.device)

    stacks = (of_a, 0, of_a.shape[1]), (0, of_b, 0, len(b), True, len(b))
    slots = torch.arange(rows, dtype=torch.int32, device=x.device), number(rows), number(0), number(0), 1
    kernel.lora(out, x.contiguous(), *stacks, rank, 1, *slots)
    return out
