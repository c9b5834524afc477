"""Gated activations on CPU by the bundled kernels, with their backward in fp32."""

from __future__ import annotations

import math

import torch


def gated(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """activation(gate) * up. gate, up: [rows, D]. kind: "silu", "gelu_tanh" or "gelu" (by erf). Returns [rows, D]."""
    both = torch.cat((gate, up), -1)
    return (
        torch.ops.bi_cpu.silu_and_mul(both)
        if kind == "silu"
        else torch.ops.bi_cpu.gelu_and_mul(both, kind == "gelu_tanh")
    )


def gated_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and of up [rows, D], from grad [rows, D]."""
    g, x, u = grad.float(), gate.float(), up.float()
    value, slope = _DERIVED[kind](x)
    return (g * u * slope).to(gate.dtype), (g * value).to(up.dtype)


def _silu(x):
    s = torch.sigmoid(x)
    return x * s, s * (1 + x * (1 - s))


def _gelu_tanh(x):
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (x + 0.044715 * x * x * x))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def _gelu(x):
    share = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return x * share, share + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


# By kind: x -> (the activation, its derivative).
_DERIVED = {"silu": _silu, "gelu_tanh": _gelu_tanh, "gelu": _gelu}
