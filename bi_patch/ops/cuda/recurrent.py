"""Gated delta nets on CUDA by bundled kernels, one token after the other (kernels/triton/recurrent.py)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from bi_patch.ops.registration import define

if TYPE_CHECKING:
    import torch


def define_op() -> None:
    """Define torch.ops.bi_patch.gated_rms_norm. A second call does nothing."""
    define(
        "gated_rms_norm(Tensor x, Tensor gate, Tensor weight, float eps, bool sigmoid) -> Tensor",
        _gated_norm,
        "CUDA",
        lambda x, *_: x.new_empty(x.shape),
    )


def gated_rms_norm(x, gate, weight, eps: float, sigmoid: bool) -> torch.Tensor:
    """RMSNorm of x [..., C] times weight [C] times f(gate [..., C]) -> [..., C]. f is SiLU, or the sigmoid."""
    import torch

    return torch.ops.bi_patch.gated_rms_norm(x, gate, weight, eps, sigmoid)


def _gated_norm(x, gate, weight, eps, sigmoid):
    from bi_patch.kernels.triton import recurrent

    return recurrent.gated_norm(x, gate, weight, eps, sigmoid)


def gated_delta_net(out, x, weight, a, b, A_log, dt_bias, conv_states, states, starts, slots, fresh, key_heads) -> None:
    """The convolution and the gated delta rule over x [tokens, queries | keys | values], into out [tokens, heads, V].

    fresh: bool [requests], or None if no request starts at position 0.
    """
    from bi_patch.kernels.triton import recurrent

    fresh = _zeros(x.device)[: len(slots)] if fresh is None else fresh.to(_int8())
    y = recurrent.causal_conv(x, weight, conv_states, starts, slots, fresh)
    recurrent.delta(out, y, a.contiguous(), b.contiguous(), A_log, dt_bias, states, starts, slots, fresh, key_heads)


@functools.cache
def _zeros(device) -> torch.Tensor:
    import torch

    return torch.zeros(1 << 16, dtype=torch.int8, device=device)


def _int8():
    import torch

    return torch.int8
