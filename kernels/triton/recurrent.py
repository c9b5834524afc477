"""Gated delta nets, one token after the other: the convolution before, the recurrence, and the gated norm after it.

A request's tokens run in one program from first to last, whatever step brings them, and the state is kept exactly
(inputs of the convolution in their own dtype, the recurrence in fp32). So prompts may be cut anywhere, and decode has
the bits of prefill. Each kernel is compiled once: nothing that its tile depends on changes with the batch.

causal_conv: y[t, c] = silu(w[c, 0] x[t-3, c] + ... + w[c, 3] x[t, c]), in fp32 in this order, rounded once.
delta: q and k divided by their length (q also by sqrt(K)); S = exp(g) S; u = beta (v - S k); S = S + u k^T; o = S q,
with g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b). Sums over K by tl.sum of a tile [BV, K].
gated_norm: y = round(x / sqrt(mean(x^2) + eps) * weight * f(gate)), f is silu or sigmoid; one program a row.
"""

import torch
import triton
import triton.language as tl

WIDTH = 4
_BLOCK, _VALUES, _WARPS = 256, 32, 4


@triton.jit
def _input(X, STATES, p, start, slot, fresh, x_token, s_slot, s_token, c, mask):
    """The input at position p of a request that starts at `start` in this step; before it, the state holds inputs."""
    held = p - start + 3
    inside = tl.where(p >= start, mask, False)
    before = tl.where((p < start) & (fresh == 0), mask, False)
    x = tl.load(X + p * x_token + c, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(STATES + slot * s_slot + held * s_token + c, mask=before, other=0.0)
    return tl.where(inside, x, s.to(tl.float32))


@triton.jit(do_not_specialize=["requests"])
def _conv(
    X,
    W,
    STATES,
    OUT,
    STARTS,
    SLOTS,
    FRESH,
    WHICH,
    requests,
    x_token,
    s_slot,
    s_token,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    r = tl.load(WHICH + t)
    if r >= requests:
        return
    slot, start = tl.load(SLOTS + r).to(tl.int64), tl.load(STARTS + r).to(tl.int64)
    if slot <= 0:
        return
    fresh = tl.load(FRESH + r).to(tl.int32)
    y = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(4):
        x = _input(X, STATES, t - 3 + i, start, slot, fresh, x_token, s_slot, s_token, c, mask)
        y += tl.load(W + c * 4 + i, mask=mask, other=0.0).to(tl.float32) * x
    y = y / (1.0 + tl.exp(-y))
    tl.store(OUT + t * C + c, y.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _keep(X, STATES, STARTS, SLOTS, FRESH, x_token, s_slot, s_token, C: tl.constexpr, BLOCK: tl.constexpr):
    """The last three inputs of each request into its state. A program reads all three before it writes."""
    r = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    slot = tl.load(SLOTS + r).to(tl.int64)
    start, end = tl.load(STARTS + r).to(tl.int64), tl.load(STARTS + r + 1).to(tl.int64)
    if (slot <= 0) | (start == end):
        return
    fresh = tl.load(FRESH + r).to(tl.int32)
    a = _input(X, STATES, end - 3, start, slot, fresh, x_token, s_slot, s_token, c, mask)
    b = _input(X, STATES, end - 2, start, slot, fresh, x_token, s_slot, s_token, c, mask)
    d = _input(X, STATES, end - 1, start, slot, fresh, x_token, s_slot, s_token, c, mask)
    to = STATES + slot * s_slot + c
    tl.store(to, a.to(STATES.dtype.element_ty), mask=mask)
    tl.store(to + s_token, b.to(STATES.dtype.element_ty), mask=mask)
    tl.store(to + 2 * s_token, d.to(STATES.dtype.element_ty), mask=mask)


@triton.jit
def _delta(
    X,
    A,
    B,
    A_LOG,
    DT_BIAS,
    STATES,
    OUT,
    STARTS,
    SLOTS,
    FRESH,
    s_slot,
    scale,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
):
    i_v, i_nh = tl.program_id(0), tl.program_id(1)
    r, head = i_nh // HV, i_nh % HV
    slot = tl.load(SLOTS + r).to(tl.int64)
    start, end = tl.load(STARTS + r).to(tl.int64), tl.load(STARTS + r + 1).to(tl.int64)
    if (slot <= 0) | (start == end):
        return
    group = head // (HV // H)
    k_at, v_at = tl.arange(0, K), i_v * BV + tl.arange(0, BV)
    p_state = STATES + slot * s_slot + head * V * K + v_at[:, None] * K + k_at[None, :]
    state = tl.load(p_state).to(tl.float32)
    if tl.load(FRESH + r).to(tl.int32) != 0:
        state = tl.zeros([BV, K], tl.float32)
    rate = -tl.exp(tl.load(A_LOG + head).to(tl.float32))
    bias = tl.load(DT_BIAS + head).to(tl.float32)
    for t in range(start, end):
        row = X + t * (2 * H * K + HV * V)
        q = tl.load(row + group * K + k_at).to(tl.float32)
        k = tl.load(row + H * K + group * K + k_at).to(tl.float32)
        v = tl.load(row + 2 * H * K + head * V + v_at).to(tl.float32)
        step = tl.load(A + t * HV + head).to(tl.float32) + bias
        step = tl.where(step <= 20.0, tl.log(1.0 + tl.exp(step)), step)
        beta = tl.sigmoid(tl.load(B + t * HV + head).to(tl.float32))
        q = q * (tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * scale)
        k = k * tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
        state = state * tl.exp(rate * step)
        u = beta * (v - tl.sum(state * k[None, :], 1))
        state = state + u[:, None] * k[None, :]
        o = tl.sum(state * q[None, :], 1)
        tl.store(OUT + (t * HV + head) * V + v_at, o.to(OUT.dtype.element_ty))
    tl.store(p_state, state)


@triton.jit(do_not_specialize=["rows", "g_row"])
def _gated_norm(
    X, GATE, WEIGHT, OUT, rows, heads, g_row, g_head, eps, SIGMOID: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < C
    x = tl.load(X + r * C + c, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(GATE + (r // heads) * g_row + (r % heads) * g_head + c, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / C + eps) * tl.load(WEIGHT + c, mask=mask, other=0.0).to(tl.float32)
    f = 1.0 / (1.0 + tl.exp(-gate))
    if not SIGMOID:
        f = f * gate
    tl.store(OUT + r * C + c, (y * f).to(OUT.dtype.element_ty), mask=mask)


def causal_conv(x, weight, states, starts, slots, fresh):
    """x [tokens, C] (rows may be strided), weight [C, 4], states [slots, 3, C] -> silu(conv(x)) [tokens, C].

    starts int32 [requests + 1], slots int32 [requests] (0 and below: skipped), fresh int8 [requests]: 1 where the
    request starts at position 0. The states are updated in place.
    """
    requests, (tokens, dim) = len(slots), x.shape
    out = torch.empty(tokens, dim, dtype=x.dtype, device=x.device)
    at = torch.arange(tokens, dtype=torch.int32, device=x.device)
    which = torch.searchsorted(starts[1:].contiguous(), at, right=True, out_int32=True)
    blocks = triton.cdiv(dim, _BLOCK)
    given = (x.stride(0), states.stride(0), states.stride(1), dim, _BLOCK)
    _conv[tokens, blocks](x, weight, states, out, starts, slots, fresh, which, requests, *given, num_warps=_WARPS)
    _keep[requests, blocks](x, states, starts, slots, fresh, *given, num_warps=_WARPS)
    return out


def delta(out, x, a, b, A_log, dt_bias, states, starts, slots, fresh, key_heads):
    """The gated delta rule over x [tokens, queries | keys | values], dense, into out [tokens, HV, V], dense.

    a, b [tokens, HV], dense. states fp32 [slots, HV, V, K], updated in place. starts, slots, fresh as above.
    """
    heads, values, keys = states.shape[1:]
    grid = (values // _VALUES, len(slots) * heads)
    _delta[grid](
        x,
        a,
        b,
        A_log,
        dt_bias,
        states,
        out,
        starts,
        slots,
        fresh,
        states.stride(0),
        keys**-0.5,
        key_heads,
        heads,
        keys,
        values,
        _VALUES,
        num_warps=_WARPS,
        num_stages=3,
    )


def gated_norm(x, gate, weight, eps, sigmoid):
    """RMSNorm of each row of x [..., C] times weight [C] times f(gate [..., C]) -> [..., C]."""
    x, dim = x.contiguous(), x.shape[-1]
    gate = gate.reshape(x.numel() // (x.shape[-2] * dim), x.shape[-2], dim) if x.dim() > 1 else gate.reshape(1, 1, dim)
    gate = gate if gate.stride(-1) == 1 else gate.contiguous()
    out = torch.empty_like(x)
    rows = x.numel() // dim
    _gated_norm[rows,](
        x,
        gate,
        weight,
        out,
        rows,
        gate.shape[1],
        gate.stride(0),
        gate.stride(1),
        eps,
        sigmoid,
        dim,
        triton.next_power_of_2(dim),
        num_warps=1,
    )
    return out
