"""RMSNorm, SiLU, rotary embedding and the choice of experts on CPU: accuracy, order, equal bits in any batch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
COLUMNS = [1, 7, 16, 33, 64, 100, 576, 1025]
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22}


def make(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got, want, dtype):
    assert got.dtype == dtype and got.shape == want.shape
    return ((got.double() - want).abs() <= want.abs() * EPS[dtype] * 1.01 + 2e-6).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", COLUMNS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_accuracy(ops, dtype, cols, offset):
    x, residual, weight = (make(*s, dtype=dtype, seed=i) for i, s in enumerate([(13, cols), (13, cols), (cols,)]))
    added = (x.float() + residual.float()).to(dtype)
    exact = added.double() * (added.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    out, sums = ops.add_rms_norm(x, residual, weight, 1e-6, offset)
    assert torch.equal(sums, added)
    assert close(out, exact * (weight.double() + offset), dtype)
    assert torch.equal(ops.rms_norm(added, weight, 1e-6, offset), out)
    assert close(ops.rms_norm(added, None, 1e-6, offset), exact, dtype)


@pytest.mark.parametrize("cols", [16, 100, 576])
def test_norm_sums_in_its_documented_order(ops, cols):
    x = make(5, cols, dtype=torch.float32)
    lanes = torch.zeros(5, 64)
    for c in range(cols):  # one FMA: exact in fp64, rounded to fp32
        lane = c % 64
        lanes[:, lane] = (x[:, c].double().square() + lanes[:, lane].double()).float()
    quarters = lanes.split(16, dim=1)
    held = (quarters[0] + quarters[1]) + (quarters[2] + quarters[3])
    while held.shape[1] > 1:
        held = held[:, : held.shape[1] // 2] + held[:, held.shape[1] // 2 :]
    mean = held.numpy() / np.float32(cols) + np.float32(1e-5)
    inverse = np.float32(1) / np.sqrt(mean)  # torch's reciprocal is not rounded correctly
    assert torch.equal(ops.rms_norm(x, None, 1e-5, 0.0), x * torch.from_numpy(inverse))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [33, 576])
def test_a_norm_does_not_depend_on_rows_strides_or_threads(ops, threads, dtype, cols):
    x, residual, weight = make(300, cols, dtype=dtype), make(300, cols, dtype=dtype, seed=1), make(cols, dtype=dtype)
    want, sums = ops.add_rms_norm(x, residual, weight, 1e-6, 0.0)
    for m in [*range(1, 9), 31, 64, 255, 257]:
        for at in (0, 300 - m):
            rows = slice(at, at + m)
            out, added = ops.add_rms_norm(x[rows], residual[rows], weight, 1e-6, 0.0)
            assert torch.equal(out, want[rows]) and torch.equal(added, sums[rows]), m
    wide = make(300, 4, cols + 5, dtype=dtype)
    heads = wide[:, 1:3, 2 : cols + 2]  # a strided view, like query and key heads in the QKV projection's output
    assert torch.equal(ops.rms_norm(heads, weight, 1e-6, 0.0), ops.rms_norm(heads.contiguous(), weight, 1e-6, 0.0))
    assert torch.equal(
        ops.rms_norm(x.view(2, 5, 30, cols), weight, 1e-6, 0.0).view(300, cols), ops.rms_norm(x, weight, 1e-6, 0.0)
    )
    threads(3)
    assert torch.equal(ops.add_rms_norm(x, residual, weight, 1e-6, 0.0)[0], want)
    assert ops.rms_norm(x[:0], weight, 1e-6, 0.0).shape == (0, cols)


POINTWISE = {
    "sigmoid": ((), torch.sigmoid),
    "silu": ((), F.silu),
    "gelu": ((False,), F.gelu),
    "gelu tanh": ((True,), lambda x: F.gelu(x, approximate="tanh")),
    "softplus": ((1.5, 20.0), lambda x: F.softplus(x, 1.5)),
    "rsqrt": ((), torch.rsqrt),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", POINTWISE)
def test_a_pointwise_result_depends_on_its_own_element_alone(ops, threads, dtype, name):
    given, exact = POINTWISE[name]
    run = getattr(ops, name.split()[0])
    x = (make(600, 71, dtype=torch.float32) * 8).to(dtype)
    x = x.abs() if name == "rsqrt" else x
    want, out = exact(x.double()), run(x, *given)
    assert close(out, want, dtype)
    edges = torch.tensor([float("inf"), 1000.0, float("nan")], dtype=dtype)
    got, expected = run(edges, *given), exact(edges.double()).to(dtype)
    assert torch.allclose(got[:2], expected[:2], rtol=EPS[dtype]) and got[2].isnan()
    for count in (1, 2, 3):
        threads(count)
        for m in (1, 2, 17, 129, 257, 600):
            for at in (0, (600 - m) // 2, 600 - m):
                assert torch.equal(run(x[at : at + m], *given), out[at : at + m]), (m, at)
    turned = run(x.t(), *given)
    assert turned.stride() == x.t().stride() and torch.equal(turned, out.t())
    assert torch.equal(run(x[:, 1:], *given), out[:, 1:]) and run(x[:0], *given).shape == (0, 71)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_and_mul(ops, dtype, tanh):
    x = make(300, 2 * 100, dtype=dtype)
    want = F.gelu(x[:, :100].double(), approximate="tanh" if tanh else "none") * x[:, 100:].double()
    out = ops.gelu_and_mul(x, tanh)
    assert close(out, want, dtype)
    assert all(torch.equal(ops.gelu_and_mul(x[at : at + m], tanh), out[at : at + m]) for m, at in [(1, 7), (33, 250)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", COLUMNS)
def test_silu_and_mul(ops, threads, dtype, cols):
    x = (make(300, 2 * cols, dtype=torch.float32) * 20).to(dtype)
    x[0, 0], x[1, 0], x[2, 0] = float("inf"), -1000.0, float("nan")
    want = torch.nn.functional.silu(x[:, :cols].double()) * x[:, cols:].double()
    out = ops.silu_and_mul(x)
    finite = want.isfinite()
    assert close(out[3:], want[3:], dtype)
    assert torch.equal(out[:3].isnan(), want[:3].isnan()) and close(out[:3][finite[:3]], want[:3][finite[:3]], dtype)
    for m in (1, 2, 7, 64):
        assert torch.equal(ops.silu_and_mul(x[3 : m + 3]), out[3 : m + 3])
    wide = make(40, 2 * cols + 3, dtype=dtype)
    assert torch.equal(ops.silu_and_mul(wide[:, 1 : 2 * cols + 1]), ops.silu_and_mul(wide[:, 1:-2].contiguous()))
    threads(3)
    assert torch.equal(ops.silu_and_mul(x)[3:], out[3:])


def turned(positions, x, cache, dim, neox):
    rotary = cache.shape[1]
    cos, sin = (part[:, None] for part in cache[positions].double().chunk(2, dim=-1))
    heads = x.reshape(len(positions), -1, dim).double()
    head, rest = heads[..., :rotary], heads[..., rotary:]
    first, second = head.chunk(2, dim=-1) if neox else (head[..., ::2], head[..., 1::2])
    first, second = first * cos - second * sin, second * cos + first * sin
    head = torch.cat((first, second), -1) if neox else torch.stack((first, second), -1).flatten(-2)
    return torch.cat((head, rest), -1).view(len(positions), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("dim,rotary", [(64, 64), (80, 32), (128, 128), (96, 24)])
def test_rope(ops, threads, dtype, neox, dim, rotary):
    cache = torch.rand(50, rotary, generator=torch.Generator().manual_seed(3)).to(dtype)
    positions = torch.randint(0, 50, (70,), generator=torch.Generator().manual_seed(4))
    joint = make(70, 9 * dim, dtype=dtype)
    query = joint[:, dim : 6 * dim]
    out = ops.rope(positions, query, cache, dim, neox)
    error = (out.double() - turned(positions, query, cache, dim, neox)).abs()
    assert out.shape == query.shape and (error <= 8 * EPS[dtype]).all()  # products of up to eight cancel
    for at in (0, 5, 69):
        assert torch.equal(ops.rope(positions[at : at + 1], query[at : at + 1], cache, dim, neox), out[at : at + 1])
    assert torch.equal(ops.rope(positions, query.view(70, 5, dim), cache, dim, neox).flatten(1), out)
    threads(3)
    assert torch.equal(ops.rope(positions, query, cache, dim, neox), out)
    assert ops.rope(positions[:0], query[:0], cache, dim, neox).shape == (0, 5 * dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("experts,k", [(1, 1), (8, 2), (60, 4), (128, 8), (130, 130)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_routing(ops, threads, dtype, experts, k, renormalize):
    logits = (make(300, experts, dtype=torch.float32) * 4).round().to(dtype)  # many ties
    weights, ids = ops.softmax_topk(logits, k, renormalize)
    want = torch.sort(logits.double(), dim=-1, descending=True, stable=True)
    assert torch.equal(ids.long(), want.indices[:, :k])
    exact = logits.double().softmax(-1).gather(1, ids.long())
    exact = exact / exact.sum(-1, keepdim=True) if renormalize else exact
    assert torch.allclose(weights.double(), exact, rtol=k * 2**-23 + 1e-6, atol=1e-9)
    for m in (1, 2, 7, 64):
        one = ops.softmax_topk(logits[5 : m + 5], k, renormalize)
        assert torch.equal(one[0], weights[5 : m + 5]) and torch.equal(one[1], ids[5 : m + 5])
    wide = torch.zeros(300, experts + 3, dtype=dtype)
    wide[:, 1:-2] = logits
    threads(3)
    assert all(
        torch.equal(a, b) for a, b in zip(ops.softmax_topk(wide[:, 1:-2], k, renormalize), (weights, ids), strict=True)
    )


def test_routing_by_no_number_still_names_experts(ops):
    weights, ids = ops.softmax_topk(torch.full((2, 9), float("nan")), 4, True)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2 and weights.isnan().all()


def test_bad_input_is_refused(ops):
    x, weight, cache = make(3, 64, dtype=torch.float32), torch.ones(64), torch.ones(5, 64)
    positions = torch.arange(3)
    for message, call in [
        ("weight must be", lambda: ops.rms_norm(x, weight.bfloat16(), 1e-6, 0.0)),
        ("weight must be", lambda: ops.rms_norm(x, weight[1:], 1e-6, 0.0)),
        ("residual must be", lambda: ops.add_rms_norm(x, x[1:], weight, 1e-6, 0.0)),
        ("must be float32", lambda: ops.rms_norm(x.double(), weight.double(), 1e-6, 0.0)),
        ("x must be", lambda: ops.silu_and_mul(x[:, 1:])),
        ("cache must be", lambda: ops.rope(positions, x, cache.bfloat16(), 64, True)),
        ("cache must be", lambda: ops.rope(positions, x, cache, 32, True)),
        ("x must be", lambda: ops.rope(positions, x, cache, 48, True)),
        ("x must be", lambda: ops.rope(positions[:2], x, cache, 64, True)),
        ("of 64 experts", lambda: ops.softmax_topk(x, 65, True)),
        ("must be \\[rows, experts\\]", lambda: ops.softmax_topk(x[0], 2, True)),
        ("outside the cache", lambda: ops.rope(positions + 3, x, cache, 64, True)),
        ("must be dense int64", lambda: ops.rope(positions.int(), x, cache, 64, True)),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_the_ops_can_be_traced(ops):
    torch.library.opcheck(ops.rms_norm, (make(3, 2, 64, dtype=torch.bfloat16), None, 1e-6, 0.0))
    x = make(3, 64, dtype=torch.float32)
    torch.library.opcheck(ops.add_rms_norm, (x, x, torch.ones(64), 1e-6, 1.0))
    torch.library.opcheck(ops.silu_and_mul, (x,))
    torch.library.opcheck(ops.gelu_and_mul, (x, True))
    torch.library.opcheck(ops.softplus, (x, 1.0, 20.0))
    torch.library.opcheck(ops.softmax_topk, (x, 4, True))
    torch.library.opcheck(ops.rope, (torch.arange(3), x, torch.ones(5, 32), 64, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", COLUMNS)
def test_pooling_accuracy(ops, dtype, cols):
    x = make(13, cols, dtype=dtype)
    assert close(ops.l2_normalize(x, 1e-12), F.normalize(x.double(), dim=-1), dtype)
    assert close(ops.softmax(x), x.double().softmax(-1), dtype)
    means = ops.mean_rows(x, torch.tensor([0, 1, 5, 13]))
    want = torch.stack([x[a:b].double().mean(0) for a, b in ((0, 1), (1, 5), (5, 13))])
    assert close(means, want, torch.float32)


def test_pooling_sums_in_its_documented_orders(ops):
    x = make(40, 70, dtype=torch.float32)
    total = torch.zeros(70)
    for row in x[3:40]:
        total = total + row
    assert torch.equal(ops.mean_rows(x, torch.tensor([3, 40]))[0], total / 37)
    length = torch.full((1, 70), 1e-20)
    assert torch.equal(ops.l2_normalize(length, 1e-12), length / 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [1, 33, 576])
def test_pooling_does_not_depend_on_rows_strides_or_threads(ops, threads, dtype, cols):
    x = make(300, cols, dtype=dtype)
    for name in ("l2_normalize", "softmax"):
        call = (lambda t: ops.l2_normalize(t, 1e-12)) if name == "l2_normalize" else ops.softmax
        want = call(x)
        for m in (1, 2, 7, 64, 255):
            for at in (0, 300 - m):
                assert torch.equal(call(x[at : at + m]), want[at : at + m])
                assert torch.equal(call(x[at]), want[at])
        wide = torch.cat([x, x], 1)[:, :cols]
        threads(3)
        assert torch.equal(call(wide), want)
        threads(1)
    starts = torch.tensor([0, 1, 30, 31, 288, 300])
    want = ops.mean_rows(x, starts)
    threads(3)
    assert torch.equal(ops.mean_rows(x, starts), want)
    for i, (a, b) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        assert torch.equal(ops.mean_rows(x[a:b], torch.tensor([0, b - a]))[0], want[i])


def test_pooling_refuses_wrong_sequences(ops):
    x = make(4, 8, dtype=torch.float32)
    for starts in ([0, 5], [0, 2, 2, 4], [-1, 4]):
        with pytest.raises(RuntimeError, match="mean_rows"):
            ops.mean_rows(x, torch.tensor(starts))
    with pytest.raises(RuntimeError, match="int64"):
        ops.mean_rows(x, torch.tensor([0, 4], dtype=torch.int32))


def test_nan_stays_nan_in_its_row(ops):
    x = make(3, 20, dtype=torch.float32)
    x[1, 7] = float("nan")
    for got in (ops.l2_normalize(x, 1e-12), ops.softmax(x)):
        assert got[1].isnan().all() and got[[0, 2]].isfinite().all()
