"""Rotary embedding on CUDA as an op opaque to torch.compile: compiled equals eager (kernels/triton/rope.py)."""

from __future__ import annotations

from bi_patch.ops.registration import define


def define_op() -> None:
    """Define torch.ops.bi_patch.rope. Idempotent."""
    define(
        "rope(Tensor positions, Tensor q, Tensor k, Tensor cache, int head_size, Tensor? q_weight, Tensor? k_weight, "
        "float eps) -> (Tensor, Tensor)",
        _rope,
        "CUDA",
        lambda positions, q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    )


def covers(head_size: int, rotary_dim: int, neox: bool) -> bool:
    """Whether the bundled kernel computes this form of the embedding."""
    return neox and rotary_dim == head_size and head_size >= 16 and head_size & (head_size - 1) == 0


def rope(positions, q, k, cache, head_size: int, q_weight=None, k_weight=None, eps: float = 0.0):
    """q [..., Hq * D] and k [..., Hk * D] rotated by positions [T]; with weights [D], each head is normed first."""
    import torch

    flat = torch.ops.bi_patch.rope(
        positions,
        q.view(positions.shape[0], -1),
        k.view(positions.shape[0], -1),
        cache,
        head_size,
        q_weight,
        k_weight,
        eps,
    )
    return flat[0].view(q.shape), flat[1].view(k.shape)


def _rope(positions, q, k, cache, head_size, q_weight, k_weight, eps):
    from bi_patch.kernels.triton import rope as kernel

    return kernel.rotate(positions, q, k, cache, head_size, q_weight, k_weight, eps)
