"""RMSNorm and LayerNorm on CUDA by bundled kernels with one order for all row counts (kernels/triton/norm.py).

torch.compile does not trace into the ops.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from bi_patch.ops.registration import define

if TYPE_CHECKING:
    import torch


def define_ops() -> None:
    """Define torch.ops.bi_patch.rms_norm, add_rms_norm and layer_norm. A second call does nothing."""
    arguments = "Tensor? weight, float eps, float offset"
    define(f"rms_norm(Tensor x, {arguments}) -> Tensor", _rms_norm, "CUDA", lambda x, *_: x.new_empty(x.shape))
    define(
        f"add_rms_norm(Tensor x, Tensor residual, {arguments}) -> (Tensor, Tensor)",
        _add_rms_norm,
        "CUDA",
        lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
    )
    arguments = "Tensor? weight, Tensor? bias, float eps"
    define(f"layer_norm(Tensor x, {arguments}) -> Tensor", _layer_norm, "CUDA", lambda x, *_: x.new_empty(x.shape))


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, residual: torch.Tensor | None = None, offset: float = 0.0
):
    """RMSNorm of x [..., C] times (weight [C] + offset) -> [..., C].

    With a residual [..., C], the function norms x + residual and returns (the norm, x + residual).
    """
    import torch

    if residual is None:
        return torch.ops.bi_patch.rms_norm(x, weight, eps, offset)
    return torch.ops.bi_patch.add_rms_norm(x, residual, weight, eps, offset)


def covers_layer_norm(x: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether `layer_norm` serves a LayerNorm of x over its last dimensions `shape`."""
    import torch

    floats = (torch.bfloat16, torch.float16, torch.float32)
    return x.is_cuda and x.dtype in floats and len(shape) == 1 and _kernel().covers_layer_norm(shape[0])


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """LayerNorm of x [..., C] with weight and bias [C] -> [..., C], in x's dtype, computed in fp32."""
    import torch

    return torch.ops.bi_patch.layer_norm(x, weight, bias, eps)


@functools.cache
def _kernel():
    from bi_patch.kernels.triton import norm

    return norm


def _layer_norm(x, weight, bias, eps):
    return _kernel().layer_norm(x, weight, bias, eps)


def _rms_norm(x, weight, eps, offset):
    return _kernel().rms_norm(x, weight, eps, None, offset)[0]


def _add_rms_norm(x, residual, weight, eps, offset):
    return _kernel().rms_norm(x, weight, eps, residual, offset)
