"""Rotary embedding on CUDA by the bundled kernel (kernels/triton/rope.py).

torch.compile does not trace into the op, so compiled and eager code give the same bits.
"""

from __future__ import annotations

import functools

from bi_patch.ops.registration import define


def define_op() -> None:
    """Define torch.ops.bi_patch.rope. A second call does nothing."""
    define(
        "rope(Tensor positions, Tensor q, Tensor k, Tensor cache, int head_size, Tensor? q_weight, Tensor? k_weight, "
        "float eps) -> (Tensor, Tensor)",
        _rope,
        "CUDA",
        lambda positions, q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    )


def covers(head_size: int, rotary_dim: int, neox: bool) -> bool:
    """Whether the bundled kernel computes this form: neox style, all of a head rotated, head_size a power of two."""
    return neox and rotary_dim == head_size and head_size >= 16 and head_size & (head_size - 1) == 0


def rope(positions, q, k, cache, head_size: int, q_weight=None, k_weight=None, eps: float = 0.0):
    """q [..., Hq * head_size] and k [..., Hk * head_size], rotated by positions [T] -> the same shapes.

    cache: [P, head_size], cosines, then sines. q_weight, k_weight: [head_size] or None. With these weights, each head
    is first normed (RMSNorm with `eps`), then rotated.
    """
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


@functools.cache
def _kernel():
    from bi_patch.kernels.triton import rope

    return rope


def _rope(positions, q, k, cache, head_size, q_weight, k_weight, eps):
    return _kernel().rotate(positions, q, k, cache, head_size, q_weight, k_weight, eps)
