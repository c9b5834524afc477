"""Rotary embedding (neox style) of queries and keys, optionally after an RMSNorm of each head, in one launch.

The halves (a, b) of a head become (a * cos - b * sin, b * cos + a * sin), in fp32, rounded once. With norm weights, the
kernel first normalizes each head over its own elements in fp32 and rounds the result. q [T, Hq * D], k [T, Hk * D], in
bf16, fp16 or fp32. Limits: the rotation covers the whole head; D is a power of two.

Order of the norm's sum: one program holds whole heads, in a tile that depends on D alone.
"""

import torch
import triton
import triton.language as tl

from .launch import Launcher, empty

_HEADS = 8


@triton.jit
def _rotate(
    positions,
    q,
    k,
    q_weight,
    k_weight,
    cache,
    q_out,
    k_out,
    heads_q,
    heads_k,
    stride_q,
    stride_k,
    stride_cache,
    eps,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, HALF)[None, :]
    of_q = (h < heads_q)[:, None]
    of_k = ((h >= heads_q) & (h < heads_q + heads_k))[:, None]
    q_at = t * stride_q + (h * 2 * HALF)[:, None] + d
    k_at = t * stride_k + ((h - heads_q) * 2 * HALF)[:, None] + d
    a = tl.load(q + q_at, mask=of_q, other=0.0).to(tl.float32) + tl.load(k + k_at, mask=of_k, other=0.0).to(tl.float32)
    b = tl.load(q + q_at + HALF, mask=of_q, other=0.0).to(tl.float32)
    b += tl.load(k + k_at + HALF, mask=of_k, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * HALF) + eps)[:, None]
        a_weight = tl.where(of_q, tl.load(q_weight + d), tl.load(k_weight + d)).to(tl.float32)
        b_weight = tl.where(of_q, tl.load(q_weight + HALF + d), tl.load(k_weight + HALF + d)).to(tl.float32)
        a = (a * scale * a_weight).to(q_out.dtype.element_ty).to(tl.float32)
        b = (b * scale * b_weight).to(q_out.dtype.element_ty).to(tl.float32)
    row = cache + tl.load(positions + t) * stride_cache
    cos = tl.load(row + d).to(tl.float32)
    sin = tl.load(row + HALF + d).to(tl.float32)
    first = (a * cos - b * sin).to(q_out.dtype.element_ty)
    second = (b * cos + a * sin).to(q_out.dtype.element_ty)
    q_to = t * heads_q * 2 * HALF + (h * 2 * HALF)[:, None] + d
    k_to = t * heads_k * 2 * HALF + ((h - heads_q) * 2 * HALF)[:, None] + d
    tl.store(q_out + q_to, first, mask=of_q)
    tl.store(q_out + q_to + HALF, second, mask=of_q)
    tl.store(k_out + k_to, first, mask=of_k)
    tl.store(k_out + k_to + HALF, second, mask=of_k)


_launch_rotate = Launcher(_rotate)


def rotate(
    positions: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    cache: torch.Tensor,
    head_size: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q [T, Hq * head_size] and k [T, Hk * head_size] (Hk may be 0). Returns new contiguous tensors.

    positions: [T] integers. cache: [P, head_size], cosines of the first half, then sines, of any float dtype.
    q_weight, k_weight: [head_size], both or neither. Rows of q and k may be strided; the last dimension is contiguous.
    """
    tokens = q.shape[0]
    heads_q, heads_k = q.shape[1] // head_size, k.shape[1] // head_size
    q_out, k_out = empty(q, q.shape), empty(k, k.shape)
    if tokens:
        normed = q_weight is not None
        _launch_rotate(
            (tokens, -(-(heads_q + heads_k) // _HEADS)),
            (positions, q, k, q_weight if normed else q, k_weight if normed else k, cache, q_out, k_out),
            heads_q,
            (heads_k, q.stride(0), k.stride(0), cache.stride(0), float(eps)),
            (head_size // 2, _HEADS, normed),
            max(1, head_size // 64),
        )
    return q_out, k_out
