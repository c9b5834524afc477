"""Recurrent layers on CPU: accuracy against fp64, and equal bits however a request's tokens come."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bi_patch.seams.cpu import norm

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-18}
TOKENS = 75
CUTS = [(), (1,), (64,), (7, 8, 9, 40), tuple(range(1, TOKENS))]


def make(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spans(lengths, slots, fresh):
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return starts, torch.tensor(slots, dtype=torch.int32), torch.tensor(fresh)


def close(got, want, dtype):
    return (got.double() - want).abs().max() <= EPS[dtype] * want.abs().max()


class Conv:
    """A causal convolution of 70 channels, with a window of four tokens."""

    def __init__(self, ops, dtype, silu=True):
        self.ops, self.dtype, self.silu = ops, dtype, silu
        self.weight, self.bias = make(70, 4, dtype=dtype), make(70, dtype=dtype, seed=1)
        self.x = make(TOKENS, 90, dtype=dtype, seed=2)[:, 5:75]

    def states(self):
        return torch.full((5, 3, 70), float("nan"), dtype=self.dtype)

    def run(self, states, rows, *given):
        x = torch.cat([self.x[i] for i in rows]) if len(rows) > 1 else self.x[rows[0]]
        return self.ops.causal_conv(x, self.weight, self.bias, states, *given, self.silu)

    def exact(self):
        x = F.pad(self.x.double().T, (3, 0)).unsqueeze(0)
        y = F.conv1d(x, self.weight.double().unsqueeze(1), self.bias.double(), groups=70)[0].T
        return F.silu(y) if self.silu else y


class Delta:
    """A gated delta rule: two heads of keys (32), four of values (80)."""

    heads, key_heads, keys, values = 4, 2, 32, 80

    def __init__(self, ops, dtype):
        self.ops, self.dtype = ops, dtype
        self.x = make(TOKENS, 2 * 2 * 32 + 4 * 80 + 3, dtype=dtype)[:, :-3]
        self.a, self.b = make(TOKENS, 4, dtype=dtype, seed=1), make(TOKENS, 8, dtype=dtype, seed=2)[:, 2:6]
        self.rate, self.dt_bias = -make(4, seed=3).exp(), make(4, seed=4)

    def states(self):
        return torch.full((5, self.heads, self.keys, self.values + 0), float("nan"))

    def run(self, states, rows, *given):
        x, a, b = (torch.cat([t[i] for i in rows]) for t in (self.x, self.a, self.b))
        out = x.new_empty(len(x), self.heads, self.values)
        self.ops.gated_delta_rule(out, x, a, b, self.rate, self.dt_bias, states, *given, self.key_heads)
        return out

    def exact(self):
        q, k, v = self.x.double().split([64, 64, 320], -1)
        q, k = (t.view(-1, 2, 32).repeat_interleave(2, 1) for t in (q, k))
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        decay = (self.rate.double() * F.softplus(self.a.double() + self.dt_bias.double())).exp()
        beta, v = self.b.double().sigmoid(), v.view(-1, 4, 80)
        state, out = torch.zeros(4, 32, 80, dtype=torch.float64), []
        for t in range(TOKENS):
            state = state * decay[t, :, None, None]
            u = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
            state = state + torch.einsum("hk,hv->hkv", k[t], u)
            out.append(torch.einsum("hkv,hk->hv", state, q[t]) / 32**0.5)
        return torch.stack(out)


class Mamba2:
    """Mamba 2: four heads of 48 values, two groups of 16 states."""

    heads, groups, keys, values = 4, 2, 16, 48

    def __init__(self, ops, dtype):
        self.ops, self.dtype = ops, dtype
        self.x, self.dt = make(TOKENS, 4 * 48 + 2 * 2 * 16, dtype=dtype), make(TOKENS, 4, dtype=dtype, seed=1)
        self.rate, self.dt_bias, self.D = -make(4, seed=3).exp(), make(4, seed=4), make(4, seed=5)

    def states(self):
        return torch.full((5, self.heads, self.keys, self.values), float("nan"))

    def run(self, states, rows, *given):
        x, dt = (torch.cat([t[i] for i in rows]) for t in (self.x, self.dt))
        out = x.new_empty(len(x), self.heads, self.values)
        self.ops.mamba2(out, x, dt, self.rate, self.dt_bias, self.D, states, *given, self.groups, 0.0, float("inf"))
        return out

    def exact(self):
        x, b, c = self.x.double().split([192, 32, 32], -1)
        b, c = (t.view(-1, 2, 16).repeat_interleave(2, 1) for t in (b, c))
        x, dt = x.view(-1, 4, 48), F.softplus(self.dt.double() + self.dt_bias.double())
        decay = (self.rate.double() * dt).exp()
        state, out = torch.zeros(4, 16, 48, dtype=torch.float64), []
        for t in range(TOKENS):
            state = state * decay[t, :, None, None] + torch.einsum("hk,hv->hkv", b[t], dt[t, :, None] * x[t])
            out.append(torch.einsum("hkv,hk->hv", state, c[t]) + self.D.double()[:, None] * x[t])
        return torch.stack(out)


class Mamba1:
    """Mamba 1: 40 channels with 16 states each, and a gate."""

    def __init__(self, ops, dtype):
        self.ops, self.dtype = ops, dtype
        self.x, self.dt, self.gate = (make(TOKENS, 40, dtype=dtype, seed=i) for i in range(3))
        self.b, self.c = make(TOKENS, 40, dtype=dtype, seed=3)[:, 4:36].split(16, -1)
        self.A, self.D, self.dt_bias = -make(40, 16, seed=4).exp(), make(40, seed=5), make(40, seed=6)

    def states(self):
        return torch.full((5, 40, 16), float("nan"))

    def run(self, states, rows, *given):
        x, dt, b, c, gate = (torch.cat([t[i] for i in rows]) for t in (self.x, self.dt, self.b, self.c, self.gate))
        return self.ops.mamba1(x, dt, b, c, gate, self.A, self.D, self.dt_bias, states, *given)

    def exact(self):
        x, b, c = self.x.double(), self.b.double(), self.c.double()
        dt = F.softplus(self.dt.double() + self.dt_bias.double())
        state, out = torch.zeros(40, 16, dtype=torch.float64), []
        for t in range(TOKENS):
            state = state * (self.A.double() * dt[t, :, None]).exp() + (dt[t] * x[t])[:, None] * b[t]
            out.append(state @ c[t] + self.D.double() * x[t])
        return torch.stack(out) * F.silu(self.gate.double())


LAYERS = {
    "conv": Conv,
    "conv without silu": lambda *a: Conv(*a, silu=False),
    "delta": Delta,
    "mamba2": Mamba2,
    "mamba1": Mamba1,
}


@pytest.fixture(params=LAYERS)
def layer(request, ops, dtype):
    return LAYERS[request.param](ops, dtype)


def whole(layer):
    states = layer.states()
    out = layer.run(states, [slice(0, TOKENS)], *spans([TOKENS], [3], [True]))
    return out, states[3].clone()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(layer, dtype):
    assert close(whole(layer)[0], layer.exact(), dtype)


@pytest.mark.parametrize("cuts", CUTS, ids=len)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cut_changes_nothing(layer, dtype, cuts):
    want, last = whole(layer)
    states, got = layer.states(), []
    for start, end in zip((0, *cuts), (*cuts, TOKENS), strict=True):
        got.append(layer.run(states, [slice(start, end)], *spans([end - start], [1], [start == 0])))
    assert torch.equal(torch.cat(got), want) and torch.equal(states[1], last)


@pytest.mark.parametrize("dtype", DTYPES[:1], ids=str)
def test_company_and_threads_change_nothing(layer, dtype, threads):
    """A decode, a prompt's middle and a whole prompt run in one step, each in its own state."""
    want, last = whole(layer)
    for count in (1, 3):
        threads(count)
        states = layer.states()
        layer.run(states, [slice(0, TOKENS - 1)], *spans([TOKENS - 1], [2], [True]))
        layer.run(states, [slice(0, 30)], *spans([30], [4], [True]))
        rows = [slice(TOKENS - 1, TOKENS), slice(30, TOKENS), slice(0, TOKENS)]
        out = layer.run(states, rows, *spans([1, TOKENS - 30, TOKENS], [2, 4, 0], [False, False, True]))
        assert torch.equal(out, torch.cat([want[r] for r in rows]))
        assert all(torch.equal(states[slot], last) for slot in (0, 2, 4)) and states[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [24, 48])
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_gated_norm(ops, threads, dtype, group, gate_first, sigmoid):
    x, gate, weight = make(300, 48, dtype=dtype), make(300, 60, dtype=dtype, seed=1)[:, 6:54], make(48, dtype=dtype)
    f = torch.sigmoid if sigmoid else F.silu
    held = x.double() * f(gate.double()) if gate_first else x.double()
    grouped = held.view(300, -1, group)
    exact = (grouped / (grouped.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view(300, 48) * weight.double()
    exact = exact if gate_first else exact * f(gate.double())
    want = ops.gated_rms_norm(x, gate, weight, 1e-5, group, gate_first, sigmoid)
    assert ((want.double() - exact).abs() <= exact.abs() * EPS[dtype] + 1e-6).all()
    threads(3)
    for m in (1, 2, 63, 299):
        for at in (0, 300 - m):
            rows = slice(at, at + m)
            got = ops.gated_rms_norm(x[rows], gate[rows], weight, 1e-5, group, gate_first, sigmoid)
            assert torch.equal(got, want[rows])


def test_what_does_not_fit_is_refused(ops):
    conv, delta = Conv(ops, torch.bfloat16), Delta(ops, torch.bfloat16)
    for states, given, words in (
        (delta.states().bfloat16(), spans([TOKENS], [3], [True]), "float32"),
        (delta.states(), spans([TOKENS], [5], [True]), "state 5 of 5"),
        (delta.states(), spans([TOKENS + 1], [0], [True]), "tokens"),
    ):
        with pytest.raises(RuntimeError, match=words):
            delta.run(states, [slice(0, TOKENS)], *given)
    with pytest.raises(RuntimeError, match="states must be"):
        conv.run(conv.states().float(), [slice(0, TOKENS)], *spans([TOKENS], [3], [True]))


@pytest.mark.parametrize(("groups", "ranks"), [(1, 2), (1, 4), (2, 4), (2, 2), (4, 2), (3, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("rows", [1, 7])
def test_the_gated_norm_of_mamba_2_has_the_bits_of_one_rank(monkeypatch, ops, groups, ranks, rows):
    """Ranks have whole groups of a row, or gather the row if they share a group."""
    distributed = pytest.importorskip("vllm.distributed")
    made = torch.Generator().manual_seed(groups)
    x, gate = (torch.randn(rows, 192, generator=made).bfloat16() for _ in range(2))
    weight = torch.randn(192, generator=made).bfloat16()
    monkeypatch.setattr(
        distributed,
        "tensor_model_parallel_all_gather",
        lambda part, dim: next(whole for whole in (x, gate) if any(torch.equal(part, p) for p in parts(whole))),
    )

    def parts(whole):
        return whole.chunk(ranks, -1)

    def layer(rank, of):
        own = weight.chunk(of)[rank]
        return SimpleNamespace(
            use_rms_norm=True,
            weight=torch.nn.Parameter(own),
            tp_size=of,
            tp_rank=rank,
            n_groups=groups,
            group_size=192 // groups,
            variance_epsilon=1e-5,
        )

    run = norm._gate_first(None)
    want = run(layer(0, 1), x, gate)
    got = [run(layer(rank, ranks), parts(x)[rank], parts(gate)[rank]) for rank in range(ranks)]
    assert torch.equal(torch.cat(got, -1), want) and all(part.is_contiguous() for part in got)
