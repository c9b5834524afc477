"""SwiGLU with a factor of its gate on CUDA, in one launch (kernels/cuda/gated.cu). torch.compile does not trace into
the op."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bi_patch.ops.registration import define

if TYPE_CHECKING:
    import torch


def define_op() -> None:
    """Define torch.ops.bi_patch.scaled_silu_and_mul. A second call does nothing."""
    define(
        "scaled_silu_and_mul(Tensor x, float factor) -> Tensor",
        _run,
        "CUDA",
        lambda x, _: x.new_empty(x.shape[0], x.shape[1] // 2),
    )


def covers(columns: int, dtype: torch.dtype) -> bool:
    """Whether `scaled_silu_and_mul` takes gates of `columns` elements of this type."""
    from bi_patch.kernels.cuda import gated

    return gated.covers(columns, dtype)


def scaled_silu_and_mul(x: torch.Tensor, factor: float) -> torch.Tensor:
    """silu(factor * x[:, :C]) * x[:, C:] of x [tokens, 2 C] (bf16, fp16) -> [tokens, C], each step rounded."""
    import torch

    return torch.ops.bi_patch.scaled_silu_and_mul(x, factor)


def _run(x, factor):
    from bi_patch.kernels.cuda import gated

    return gated.run(x, factor)
