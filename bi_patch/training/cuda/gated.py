"""Gated activations on CUDA: vLLM's own kernel forward, which rounds the activation first, and a bundled backward."""

from __future__ import annotations

import torch

from bi_patch.kernels.triton import gated_backward as kernel
from bi_patch.training.cuda import vllm_kernels


def gated(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """activation(gate) * up. gate, up: [rows, D]. kind: "silu", "gelu_tanh" or "gelu" (by erf). Returns [rows, D]."""
    return vllm_kernels.gated(torch.cat((gate, up), -1), kind)


def gated_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and of up [rows, D], from grad [rows, D]."""
    return kernel.gated(grad, gate, up, kind)
