"""Probes gated delta nets on a GPU: bits of vLLM's FLA kernels over cuts and company, and times of decode in chunks.

    PYTHONPATH=. python3 benchmarks/hopper/recurrent.py OUT.json   # vLLM, a Hopper GPU

Heads as in Qwen3-Next: 16 of keys, 32 of values, 128 wide. Times are microseconds of a layer, the median of 50 calls
with the L2 cache flushed.
"""

import functools
import sys

import steps
import torch
from steps import graphed, timed

H, HV, D, CHUNK = 16, 32, 128, 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TIMES = 50  # calls that are timed


def make(tokens, seed=0):
    gen = torch.Generator(DEVICE).manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=gen, device=DEVICE)  # noqa: E731
    norm = lambda x: torch.nn.functional.normalize(x, dim=-1)  # noqa: E731
    q, k = (norm(rand(tokens, H, D)) for _ in range(2))
    v = rand(tokens, HV, D)
    g = -torch.nn.functional.softplus(rand(tokens, HV)) * 0.3
    beta = torch.sigmoid(rand(tokens, HV))
    return (q * D**-0.5).bfloat16(), k.bfloat16(), v.bfloat16(), g, beta


def exact(q, k, v, g, beta, state=None):
    """fp64, one token after the other: o [tokens, HV, D], state [HV, D (keys), D]."""
    q, k, v, g, beta = (t.double() for t in (q, k, v, g, beta))
    q, k = (t.repeat_interleave(HV // H, 1) for t in (q, k))
    state = torch.zeros(HV, D, D, dtype=torch.float64, device=q.device) if state is None else state.double()
    out = []
    for t in range(len(q)):
        state = state * g[t].exp()[:, None, None]
        u = beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
        state = state + torch.einsum("hk,hv->hkv", k[t], u)
        out.append(torch.einsum("hkv,hk->hv", state, q[t]))
    return torch.stack(out), state


def error(got, want):
    return float((got.double() - want).abs().max() / want.abs().max())


def fla(q, k, v, g, beta, state=None, starts=None):
    """vLLM's chunked kernels. state [requests, HV, D (values), D (keys)] fp32 or None. Returns o, states."""
    from vllm.third_party.flash_linear_attention.ops import chunk_gated_delta_rule

    starts = torch.tensor([0, len(q)], device=DEVICE, dtype=torch.int32) if starts is None else starts
    if state is None:
        state = torch.zeros(len(starts) - 1, HV, D, D, device=DEVICE)
    o, last = chunk_gated_delta_rule(
        q=q[None],
        k=k[None],
        v=v[None],
        g=g[None],
        beta=beta[None].to(v.dtype),
        scale=1.0,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=starts,
        use_qk_l2norm_in_kernel=False,
    )
    return o[0], last


def cut(x, *spans):
    return tuple(t[slice(*spans)] for t in x)


def flash(q, k, v, g, beta, state=None, starts=None, use_cp="auto"):
    """FlashInfer's chunked kernel as vLLM calls it; the same arguments and results as `fla`."""
    from flashinfer.gdn_prefill import chunk_gated_delta_rule

    starts = torch.tensor([0, len(q)], device=DEVICE) if starts is None else starts
    if state is None:
        state = torch.zeros(len(starts) - 1, HV, D, D, device=DEVICE)
    more = {} if use_cp is None else {"use_cp": use_cp, "backend": "flashinfer"}
    return chunk_gated_delta_rule(
        q=q, k=k, v=v, g=torch.exp(g), beta=beta, initial_state=state, output_final_state=True, scale=1.0,
        cu_seqlens=starts.to(torch.int64), **more,
    )  # fmt: skip


def fla_bits(fla=fla):
    x = make(300)
    want, last = fla(*x)
    out = {"error against fp64": error(want, exact(*x)[0])}
    for at in (64, 128, 192, 100, 33):
        first, state = fla(*cut(x, 0, at))
        second, end = fla(*cut(x, at, 300), state)
        out[f"cut at {at}: rows that differ"] = int((torch.cat([first, second]) != want).any(-1).any(-1).sum())
        out[f"cut at {at}: state equal"] = bool(torch.equal(end, last))
    others = [make(n, n) for n in (1, 17, 64, 500)]
    parts = [*others[:2], x, *others[2:]]
    packed = tuple(torch.cat(t) for t in zip(*parts, strict=True))
    sizes = torch.tensor([0, *(len(p[0]) for p in parts)]).cumsum(0).to(torch.int32)
    got, states = fla(*packed, None, sizes.to(DEVICE))
    out["company: rows that differ"] = int((got[sizes[2] : sizes[3]] != want).any(-1).any(-1).sum())
    out["company: state equal"] = bool(torch.equal(states[2], last[0]))
    out["lone lengths: last rows that differ (1 to 64)"] = sum(
        int((fla(*cut(x, 0, t))[0][t - 1] != want[t - 1]).any()) for t in range(1, 65)
    )
    _, state = fla(*cut(x, 0, 64))
    out["open chunk from a state: last rows that differ (1 to 64)"] = sum(
        int((fla(*cut(x, 64, 64 + t), state)[0][t - 1] != want[64 + t - 1]).any()) for t in range(1, 65)
    )
    return out


def tile_bits(values=64, warps=4):
    import delta_tile as delta

    def run(x, states, starts, fresh):
        given = [torch.tensor(t, dtype=torch.int32, device=DEVICE) for t in (starts, range(len(fresh)), fresh)]
        return delta.prefill(*x, states, *given, values=values, warps=warps)

    x = make(200)
    states = torch.zeros(5, HV, D, D, device=DEVICE)
    want = run(x, states, [0, 200], [1])
    last = states[0].clone()  # at 192
    reference, _ = exact(*x)
    out = {"error against fp64": error(want, reference)}
    first, state = run(cut(x, 0, 128), states, [0, 128], [1]), states[0].clone()
    second = run(cut(x, 128, 200), states, [0, 72], [0])
    out["cut at 128: rows that differ"] = int((torch.cat([first, second]) != want).any(-1).any(-1).sum())
    out["cut at 128: state equal"] = bool(torch.equal(states[0], last))
    others = [make(n, n) for n in (1, 17, 64, 130)]
    parts = [*others[:2], x, *others[2:]]
    packed = tuple(torch.cat(t) for t in zip(*parts, strict=True))
    sizes = torch.tensor([0, *(len(p[0]) for p in parts)]).cumsum(0).tolist()
    got = run(packed, states, sizes, [1] * 5)
    out["company: rows that differ"] = int((got[sizes[2] : sizes[3]] != want).any(-1).any(-1).sum())
    out["company: state equal"] = bool(torch.equal(states[2], last))
    # Decode the tokens 128 to 191 of this request beside other requests at other rows of their chunks.
    differing, states = 0, torch.stack([state, *torch.randn(3, HV, D, D, device=DEVICE)])
    pad = lambda t: torch.cat([t, torch.randn(64, *t.shape[1:], device=DEVICE).to(t.dtype)])[:64]  # noqa: E731
    noise = [make(64, s) for s in (7, 8, 9)]
    for t in range(1, 65):
        rows = [pad(p[128 : 128 + t]) for p in x[1:]]
        open_ = [torch.stack([r, *(n[i + 1] for n in noise)]) for i, r in enumerate(rows)]
        q = torch.stack([x[0][128 + t - 1], *(n[0][0] for n in noise)])
        lengths = torch.tensor([t, 1 + t % 63, 63 - t % 60, 5], dtype=torch.int32, device=DEVICE)
        got = delta.decode(q, *open_, states, lengths, values=values, warps=warps)
        differing += int((got[0] != want[128 + t - 1]).any())
    out["decode: tokens that differ (of 64)"] = differing
    out["decode: state at the boundary equal"] = bool(torch.equal(states[0], last))
    return out


def recurrent_inputs(n):
    from vllm.third_party.flash_linear_attention.ops import fused_recurrent_gated_delta_rule_packed_decode as run

    mixed = torch.randn(n, 2 * H * D + HV * D, device=DEVICE, dtype=torch.bfloat16)
    a, b = (torch.randn(n, HV, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    A_log, dt = torch.randn(HV, device=DEVICE), torch.randn(HV, device=DEVICE)
    states = torch.randn(n + 1, HV, D, D, device=DEVICE)
    out = torch.empty(n, 1, HV, D, device=DEVICE, dtype=torch.bfloat16)
    slots = torch.arange(1, n + 1, device=DEVICE, dtype=torch.int32)
    return lambda: run(mixed, a, b, A_log, dt, D**-0.5, states, out, slots, use_qk_l2norm_in_kernel=True)


def decode_times(n):
    import delta_tile as delta

    out = {"recurrent (stock)": timed(graphed(recurrent_inputs(n)), TIMES)}
    out["state bytes, recurrent"] = 2 * n * HV * D * D * 4
    states = torch.randn(n, HV, D, D, device=DEVICE)
    for rows in (1, 32, 63):
        x = [make(64, s) for s in range(2)]
        q = torch.randn(n, H, D, device=DEVICE).bfloat16()
        open_ = [torch.stack([x[s % 2][i] for s in range(n)]) for i in range(1, 5)]
        lengths = torch.full((n,), rows, dtype=torch.int32, device=DEVICE)
        for values, warps in ((64, 4), (128, 8), (128, 4)):
            try:
                call = lambda: delta.decode(q, *open_, states, lengths, values=values, warps=warps)  # noqa: E731,B023
                out[f"tile of {values}, {warps} warps, {rows} rows open"] = timed(graphed(call), TIMES)
            except Exception as e:
                out[f"tile of {values}, {warps} warps, {rows} rows open"] = repr(e)[:200]
        out[f"bytes read, chunked, {rows} rows"] = n * (HV * D * D * 4 + rows * (H * D * 2 + HV * D * 2 + HV * 8))
    starts = torch.arange(0, 64 * n + 1, 64, device=DEVICE, dtype=torch.int32)
    packed = tuple(t.repeat(n, *[1] * (t.ndim - 1)) for t in make(64))
    state = torch.randn(n, HV, D, D, device=DEVICE)
    out["FLA chunk kernels on 64 rows"] = timed(lambda: fla(*packed, state, starts), 20)
    return out


def prefill_times(lengths):
    import delta_tile as delta

    x = make(sum(lengths))
    starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    state = torch.zeros(len(lengths), HV, D, D, device=DEVICE)
    out = {"FLA": timed(lambda: fla(*x, state, starts), 20)}
    slots = torch.arange(len(lengths), device=DEVICE, dtype=torch.int32)
    fresh = torch.ones_like(slots)
    for values, warps in ((32, 4), (64, 4), (128, 8)):
        call = lambda: delta.prefill(*x, state, starts, slots, fresh, values=values, warps=warps)  # noqa: E731,B023
        try:
            out[f"tile of {values}, {warps} warps"] = timed(call, 20)
        except Exception as e:
            out[f"tile of {values}, {warps} warps"] = repr(e)[:200]
    for use_cp in ("auto", False, None):
        try:
            out[f"FlashInfer, use_cp={use_cp}"] = timed(lambda use_cp=use_cp: flash(*x, state, starts, use_cp), 20)
        except Exception as e:
            out[f"FlashInfer, use_cp={use_cp}"] = repr(e)[:300]
    return out


def mamba2_bits():
    """vLLM's Mamba 2 kernels: chunks of 256 at absolute positions, cuts anywhere, company, and decode."""
    from vllm.model_executor.layers.mamba.ops.mamba_ssm import selective_state_update
    from vllm.model_executor.layers.mamba.ops.ssd_combined import mamba_chunk_scan_combined_varlen

    heads, size, states, groups, chunk = 32, 64, 128, 1, 256
    gen = torch.Generator(DEVICE).manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=gen, device=DEVICE)  # noqa: E731
    total = 700
    x, dt = rand(total, heads, size).bfloat16(), rand(total, heads).bfloat16()
    b, c = rand(total, groups, states).bfloat16(), rand(total, groups, states).bfloat16()
    a, dd, bias = -rand(heads).exp(), rand(heads), rand(heads)

    def run(spans, initial):
        """spans: (first, last) of each request's tokens. initial: their states [requests, ...] or None."""
        rows = torch.cat([torch.arange(*span) for span in spans]).to(DEVICE)
        edges, which, last, at = [0], [], [], 0
        for r, (first, end) in enumerate(spans):
            p = first
            while p < end:
                stop = min(end, (p // chunk + 1) * chunk)
                at += stop - p
                edges.append(at)
                which.append(r)
                p = stop
            last.append(len(which) - 1)
        ints = lambda t: torch.tensor(t, dtype=torch.int32, device=DEVICE)  # noqa: E731
        starts = [0]
        for first, end in spans:
            starts.append(starts[-1] + end - first)
        out = torch.empty(len(rows), heads, size, dtype=x.dtype, device=DEVICE)
        held = mamba_chunk_scan_combined_varlen(
            x[rows], dt[rows], a, b[rows], c[rows], chunk, ints(starts), ints(edges), ints(last), ints(which), out,
            D=dd, dt_bias=bias, initial_states=initial, dt_softplus=True, state_dtype=torch.float32,
        )  # fmt: skip
        return out, held

    want, last = run([(0, total)], None)
    out = {}
    for at in (256, 512, 100, 300):
        first, state = run([(0, at)], None)
        second, end = run([(at, total)], state)
        out[f"cut at {at}: rows that differ"] = int((torch.cat([first, second]) != want).any(-1).any(-1).sum())
        out[f"cut at {at}: state equal"] = bool(torch.equal(end, last))
    got, held = run([(0, 37), (0, total), (0, 300)], None)
    out["company: rows that differ"] = int((got[37 : 37 + total] != want).any(-1).any(-1).sum())
    out["company: state equal"] = bool(torch.equal(held[1:2], last))
    _, state = run([(0, 256)], None)
    state, differing = state.clone(), 0
    for t in range(256, 320):
        y = torch.empty(1, heads, size, dtype=x.dtype, device=DEVICE)
        selective_state_update(
            state, x[t : t + 1], dt[t : t + 1, :, None].expand(-1, -1, size),
            a[:, None, None].expand(-1, size, states), b[t : t + 1], c[t : t + 1],
            dd[:, None].expand(-1, size), bias[:, None].expand(-1, size), dt_softplus=True, out=y,
        )  # fmt: skip
        differing += int((y[0] != want[t]).any())
    out["decode: tokens that differ (of 64)"] = differing
    return out


def tuned():
    """The choices that Triton's autotuner made in this process, by kernel."""
    from vllm.third_party.flash_linear_attention import ops

    out = {}
    for name in ("chunk_delta_h", "chunk_o", "chunk_scaled_dot_kkt", "cumsum", "l2norm", "solve_tril", "wy_fast"):
        module = getattr(ops, name, None) or __import__(f"{ops.__name__}.{name}", fromlist=["x"])
        for key, held in vars(module).items():
            inner = held
            while inner is not None and not hasattr(inner, "cache"):
                inner = getattr(inner, "fn", None)
            if inner is not None and isinstance(getattr(inner, "cache", None), dict) and inner.cache:
                out[f"{name}.{key}"] = {str(k)[:80]: str(c) for k, c in list(inner.cache.items())[:4]}
    return out


STEPS = {
    "tile bits": tile_bits,
    "tile bits, 128 values, 8 warps": lambda: tile_bits(128, 8),
    "FLA bits": fla_bits,
    "FlashInfer bits": lambda: fla_bits(flash),
    "FlashInfer bits without context parallelism": lambda: fla_bits(functools.partial(flash, use_cp=False)),
    "Mamba 2 bits": mamba2_bits,
    **{f"decode of {n}": (lambda n=n: decode_times(n)) for n in (1, 8, 64, 256)},
    "prefill 8 x 1024": lambda: prefill_times([1024] * 8),
    "prefill 2 x 16384": lambda: prefill_times([16384] * 2),
    "prefill 64 x 128": lambda: prefill_times([128] * 64),
    "autotuned": tuned,
}


def main() -> None:
    path, only = sys.argv[1], sys.argv[2:]
    steps.run(STEPS, [name for name in STEPS if not only or name in only], path)


if __name__ == "__main__":
    main()
