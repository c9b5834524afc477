"""Gated activations on CPU by the bundled kernel: fp32 inside, rounded once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(x[..., :D]) * x[..., D:] for x [..., 2 D] (bf16, fp16 or fp32) -> [..., D], rounded once."""
    import torch

    return torch.ops.bi_cpu.silu_and_mul(x)


def gelu_and_mul(x: torch.Tensor, tanh: bool) -> torch.Tensor:
    """gelu(x[..., :D]) * x[..., D:] for x [..., 2 D] (bf16, fp16 or fp32) -> [..., D], rounded once.

    tanh: the approximation by tanh; else the exact form by erf.
    """
    import torch

    return torch.ops.bi_cpu.gelu_and_mul(x, tanh)
