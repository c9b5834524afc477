"""RMSNorm on CPU by the bundled kernel, in eager and in compiled code (kernels/cpu/README.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, residual: torch.Tensor | None = None, offset: float = 0.0
):
    """RMSNorm of x [..., C] (bf16, fp16 or fp32) times (weight [C] + offset) -> [..., C].

    With a residual [..., C], the function norms x + residual and returns (the norm, x + residual).
    """
    import torch

    if residual is None:
        return torch.ops.bi_cpu.rms_norm(x, weight, eps, offset)
    return torch.ops.bi_cpu.add_rms_norm(x, residual, weight, eps, offset)


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    group: int,
    gate_first: bool,
    sigmoid: bool = False,
):
    """RMSNorm of x [..., C] over groups of `group` columns, times weight [C], times f(gate [..., C]) -> [..., C].

    f is SiLU, or the sigmoid. gate_first: x * f(gate) is normed instead. bf16, fp16 or fp32; rounded once.
    """
    import torch

    return torch.ops.bi_cpu.gated_rms_norm(x, gate, weight, eps, group, gate_first, sigmoid)
