"""LoRA adapters on CPU: the bundled GEMM, whose order the sampler's kernel of adapters has, too."""

from __future__ import annotations

import torch

from bi_patch.training.adapters import scaled
from bi_patch.training.cpu.linear import _product


def cover(dtype: torch.dtype) -> None:
    """Raise UnsupportedFeature for a dtype of rows whose adapters have no cover."""


def lora(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """y + (x @ a.T) @ (b * scaling).T; each product, the scaled b and the sum are rounded to x's dtype.

    y: [rows, N]. x: [rows, K]. a: [rank, K]. b: [N, rank]. Returns [rows, N].
    """
    return y + _product(_product(x, a.to(x.dtype), None), scaled(b, x.dtype, scaling), None)
