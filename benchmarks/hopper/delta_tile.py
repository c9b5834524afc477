"""Gated delta rule in chunks of 64 tokens aligned at position 0: one tile code for prompts and for decodes.

q, k [tokens, H, D], v [tokens, HV, D] (bf16; q and k normed, q scaled), g (log of the decay, fp32) and beta (fp32)
[tokens, HV], states [slots, HV, D, D] (fp32, keys first) -> o [tokens, HV, D] (bf16). D is 128, HV a multiple of H.

A request's state is that of its last chunk boundary. The tokens since then are its open chunk, whose rows (k, v, g,
beta) a caller keeps. `prefill` runs whole chunks and the open one. `decode` runs the open chunk again, up to the new
token, stores that row, and writes the state only where the chunk is full.

Order of a chunk, for rows i and j: G is the running sum of g (tl.cumsum over 64 rows; rows past the end are 0).
A[i, j] = beta[i] exp(G[i] - G[j]) k[i].k[j] below the diagonal; T = (I + A)^-1 by six products of 64 x 64
((I - A)(I + A^2)(I + A^4)...(I + A^32), in TF32); u = T (beta (v - exp(G) (k S))); o = exp(G) (q S) + P u, with
P[i, j] = exp(G[i] - G[j]) q[i].k[j] on and below the diagonal; S = exp(G[63]) S + (exp(G[63] - G) k)^T u. Products are
tl.dot of bf16 operands (S, T, P and u rounded to bf16) with fp32 accumulators. A row takes exact zeros from the rows
after it. So its bits depend on its own chunk up to itself, and on the state at the chunk's start.
"""

import triton
import triton.language as tl

CHUNK = 64


@triton.jit
def _tile(q, k, v, g, beta, state, full):
    """One chunk: q, k, v [64, D] bf16, g, beta [64] fp32, state [D, D] fp32 -> o [64, D] fp32, the next state."""
    rows = tl.arange(0, 64)
    total = tl.cumsum(g, 0)
    lower = rows[:, None] > rows[None, :]
    decay = tl.exp(tl.where(rows[:, None] >= rows[None, :], total[:, None] - total[None, :], 0.0))
    a = tl.where(lower, beta[:, None] * decay * tl.dot(k, tl.trans(k)), 0.0)
    power = -a
    inverse = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0) + power
    for _ in tl.static_range(5):
        power = tl.dot(power, power, input_precision="tf32")
        inverse += tl.dot(inverse, power, input_precision="tf32")
    held = state.to(k.dtype)
    rest = beta[:, None] * (v.to(tl.float32) - tl.exp(total)[:, None] * tl.dot(k, held))
    u = tl.dot(inverse.to(k.dtype), rest.to(k.dtype)).to(k.dtype)
    p = tl.where(rows[:, None] >= rows[None, :], decay * tl.dot(q, tl.trans(k)), 0.0).to(k.dtype)
    o = tl.exp(total)[:, None] * tl.dot(q, held) + tl.dot(p, u)
    if full:
        last = tl.sum(g, 0)
        scaled = (k.to(tl.float32) * tl.exp(last - total)[:, None]).to(k.dtype)
        state = state * tl.exp(last) + tl.dot(tl.trans(scaled), u)
    return o, state


@triton.jit
def _prefill(
    Q,
    K,
    V,
    G,
    BETA,
    STATES,
    OUT,
    STARTS,
    SLOTS,
    FRESH,
    H: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    BV: tl.constexpr,
):
    """Program (block of values, request, head). Requests start at a chunk boundary."""
    i_v, request, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(STARTS + request).to(tl.int64), tl.load(STARTS + request + 1).to(tl.int64)
    rows, d, cols = tl.arange(0, 64), tl.arange(0, D), i_v * BV + tl.arange(0, BV)
    group = head // (HV // H)
    p_state = STATES + (tl.load(SLOTS + request).to(tl.int64) * HV + head) * D * D + d[:, None] * D + cols[None, :]
    state = tl.zeros([D, BV], tl.float32)
    if tl.load(FRESH + request) == 0:
        state = tl.load(p_state)
    for first in range(start, end, 64):
        at = first + rows
        inside = at < end
        k = tl.load(K + (at[:, None] * H + group) * D + d[None, :], mask=inside[:, None], other=0.0)
        q = tl.load(Q + (at[:, None] * H + group) * D + d[None, :], mask=inside[:, None], other=0.0)
        v = tl.load(V + (at[:, None] * HV + head) * D + cols[None, :], mask=inside[:, None], other=0.0)
        g = tl.load(G + at * HV + head, mask=inside, other=0.0)
        beta = tl.load(BETA + at * HV + head, mask=inside, other=0.0)
        o, state = _tile(q, k, v, g, beta, state, first + 64 <= end)
        tl.store(OUT + (at[:, None] * HV + head) * D + cols[None, :], o.to(OUT.dtype.element_ty), mask=inside[:, None])
    tl.store(p_state, state)


@triton.jit
def _decode(
    Q, K, V, G, BETA, STATES, OUT, LENGTHS, H: tl.constexpr, HV: tl.constexpr, D: tl.constexpr, BV: tl.constexpr
):
    """Program (block of values, request, head). Q [requests, H, D]: the new token's. K, V, G, BETA: the open chunks
    [requests, 64, ...], the new row included; LENGTHS [requests]: their rows. Request r has state r."""
    i_v, request, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, d, cols = tl.arange(0, 64), tl.arange(0, D), i_v * BV + tl.arange(0, BV)
    group = head // (HV // H)
    length = tl.load(LENGTHS + request)
    inside, new = rows < length, rows == length - 1
    at = request.to(tl.int64) * 64 + rows
    p_state = STATES + (request.to(tl.int64) * HV + head) * D * D + d[:, None] * D + cols[None, :]
    state = tl.load(p_state)
    k = tl.load(K + (at[:, None] * H + group) * D + d[None, :], mask=inside[:, None], other=0.0)
    v = tl.load(V + (at[:, None] * HV + head) * D + cols[None, :], mask=inside[:, None], other=0.0)
    g = tl.load(G + at * HV + head, mask=inside, other=0.0)
    beta = tl.load(BETA + at * HV + head, mask=inside, other=0.0)
    q = tl.load(Q + (request * H + group) * D + d[None, :] + rows[:, None] * 0, mask=new[:, None], other=0.0)
    o, state = _tile(q, k, v, g, beta, state, length == 64)
    out = (request * HV + head) * D + cols[None, :] + rows[:, None] * 0
    tl.store(OUT + out, o.to(OUT.dtype.element_ty), mask=new[:, None])
    if length == 64:
        tl.store(p_state, state)


def prefill(q, k, v, g, beta, states, starts, slots, fresh, values=64, warps=4, stages=1):
    """o [tokens, HV, D] of requests that start at a chunk boundary. starts int32 [requests + 1], slots int32, fresh
    int32 [requests]: 1 where the state is zero. The states of the last boundary are written. values, warps, stages:
    the tile, which decides no bit of another tile's."""
    import torch

    heads, size = v.shape[1:]
    out = torch.empty_like(v)
    grid = (size // values, len(slots), heads)
    _prefill[grid](
        q,
        k,
        v,
        g,
        beta,
        states,
        out,
        starts,
        slots,
        fresh,
        q.shape[1],
        heads,
        size,
        values,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def decode(q, k, v, g, beta, states, lengths, values=64, warps=4, stages=1):
    """o [requests, HV, D] of one new token each. k [requests, 64, H, D], v, g, beta: the open chunks. lengths int32."""
    import torch

    heads, size = v.shape[2:]
    out = torch.empty(len(q), heads, size, dtype=v.dtype, device=v.device)
    grid = (size // values, len(q), heads)
    _decode[grid](
        q, k, v, g, beta, states, out, lengths, q.shape[1], heads, size, values, num_warps=warps, num_stages=stages
    )
    return out
