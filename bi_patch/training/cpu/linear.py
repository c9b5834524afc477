"""Linear layers on CPU by the bundled GEMM (kernels/cpu/README.md), forward and backward.

The weight is packed at each call. Packing costs a small share of a product of many rows, and a copy that is kept would
go stale silently: `param.data.copy_` and FSDP2 change a weight without changing its version.
"""

from __future__ import annotations

import torch

from bi_patch.training.ranks import by_rank


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, parts: int) -> torch.Tensor:
    """x @ weight.T + bias. x: [rows, K]. weight: [N, K]. bias: [N] or None. Returns [rows, N] in x's dtype.

    parts: 1, or how many ranks of a tensor-parallel sampler share K (bi_patch.training.ranks).
    """
    return by_rank(_product, x, weight, bias, parts)


def linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, of_x: bool, of_weight: bool, of_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x [rows, K], of weight [N, K] and of bias [N] (weight's dtype), from grad [rows, N]."""
    none = grad.new_empty(0)
    grad = grad.contiguous()
    of_rows = _product(grad, weight.to(x.dtype).t().contiguous(), None) if of_x else none
    of_weights = (grad.float().t() @ x.float()).to(weight.dtype) if of_weight else none
    return of_rows, of_weights, grad.sum(0, dtype=torch.float32).to(weight.dtype) if of_bias else none


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    n, k = weight.shape
    return torch.ops.bi_cpu.gemm(x, torch.ops.bi_cpu.gemm_pack(weight), n, k, bias)
