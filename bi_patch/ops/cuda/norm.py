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


def define_rank_ops() -> None:
    """Define torch.ops.bi_patch.square_sums and norm_by_sums. A second call does nothing."""
    import torch

    define(
        "square_sums(Tensor q, Tensor k) -> Tensor",
        _square_sums,
        "CUDA",
        lambda q, k: q.new_empty((q.shape[0], 2), dtype=torch.float32),
    )
    define(
        "norm_by_sums(Tensor x, Tensor sums, int at, Tensor weight, float eps, int count) -> Tensor",
        _norm_by_sums,
        "CUDA",
        lambda x, *_: x.new_empty(x.shape),
    )


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


def square_sums(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The sums of squares of the rows of q [T, A] and of k [T, B] -> fp32 [T, 2], for ranks that share these rows."""
    import torch

    return torch.ops.bi_patch.square_sums(q, k)


def norm_by_sums(
    x: torch.Tensor, sums: torch.Tensor, at: int, weight: torch.Tensor, eps: float, count: int
) -> torch.Tensor:
    """RMSNorm of this rank's columns x [T, C] of rows with `count` columns, times weight [C] -> [T, C] in x's dtype.

    sums: fp32 [T, 2], of which column `at` holds the sums of squares of whole rows.
    """
    import torch

    return torch.ops.bi_patch.norm_by_sums(x, sums, at, weight, eps, count)


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


@functools.cache
def _rank_kernel():
    from bi_patch.kernels.triton import rank_norm

    return rank_norm


def _square_sums(q, k):
    return _rank_kernel().square_sums(*(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k)))


def _norm_by_sums(x, sums, at, weight, eps, count):
    x = x if x.stride(-1) == 1 else x.contiguous()
    return _rank_kernel().norm(x, sums.contiguous(), at, weight, eps, count)
