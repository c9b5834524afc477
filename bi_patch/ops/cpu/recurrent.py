"""Layers with a recurrent state on CPU, by the bundled kernels: one token after the other, in prefill and decode alike.

The states hold exactly what the next token needs: the convolution's last inputs in their own type, the recurrence in
fp32. So it does not matter which step brings a token (kernels/cpu/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Spans:
    """The requests of a step.

    query_start: int32 [requests + 1], the first token of each request. slots: int32 [requests], the state of each
    request. fresh: bool [requests], whether a request starts at position 0, so that its state is zero.
    """

    query_start: torch.Tensor
    slots: torch.Tensor
    fresh: torch.Tensor


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    spans: Spans,
    silu: bool,
) -> torch.Tensor:
    """A causal convolution over each channel of x [tokens, dim] (bf16, fp16 or fp32) -> [tokens, dim].

    weight: [dim, width]. bias: [dim]. states: [slots, width - 1, dim], the inputs before the step; updated in place.
    silu: apply SiLU to the result. Raises RuntimeError for other shapes or dtypes.
    """
    import torch

    return torch.ops.bi_cpu.causal_conv(x, weight, bias, states, spans.query_start, spans.slots, spans.fresh, silu)


def gated_delta_rule(
    out: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    rate: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    spans: Spans,
    key_heads: int,
) -> None:
    """The gated delta rule over x [tokens, queries | keys | values], into out [tokens, heads, values].

    a, b: [tokens, heads], before softplus and sigmoid. rate (at most 0), dt_bias: fp32 [heads]. states: fp32 [slots,
    heads, keys, values], updated in place. Raises RuntimeError for other shapes or dtypes.
    """
    import torch

    torch.ops.bi_cpu.gated_delta_rule(
        out, x, a, b, rate, dt_bias, states, spans.query_start, spans.slots, spans.fresh, key_heads
    )


def mamba2(
    out: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    rate: torch.Tensor,
    dt_bias: torch.Tensor,
    D: torch.Tensor | None,
    states: torch.Tensor,
    spans: Spans,
    groups: int,
    limit: tuple[float, float] = (0.0, float("inf")),
) -> None:
    """Mamba 2's recurrence over x [tokens, values | B | C], into out [tokens, heads, values].

    dt: [tokens, heads], before softplus. rate (at most 0), dt_bias, D: fp32 [heads]. states: fp32 [slots, heads, keys,
    values], updated in place. groups: heads of B and C. limit: the least and the greatest step size. Raises
    RuntimeError for other shapes or dtypes.
    """
    import torch

    torch.ops.bi_cpu.mamba2(
        out, x, dt, rate, dt_bias, D, states, spans.query_start, spans.slots, spans.fresh, groups, *limit
    )


def mamba1(
    x: torch.Tensor,
    dt: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    gate: torch.Tensor | None,
    A: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor | None,
    states: torch.Tensor,
    spans: Spans,
) -> torch.Tensor:
    """Mamba 1's recurrence over x [tokens, dim], times SiLU of gate [tokens, dim] -> [tokens, dim].

    dt: [tokens, dim], before its bias and softplus. b, c: [tokens, size]. A (at most 0), D, dt_bias: fp32 [dim, size],
    [dim], [dim]. states: fp32 [slots, dim, size], updated in place. Raises RuntimeError for other shapes or dtypes.
    """
    import torch

    return torch.ops.bi_cpu.mamba1(
        x, dt, b, c, gate, A, D, dt_bias, states, spans.query_start, spans.slots, spans.fresh
    )
