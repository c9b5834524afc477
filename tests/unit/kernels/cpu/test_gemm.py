"""The CPU GEMM: its accuracy, and equal bits for a row in any batch."""

import pytest
import torch

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (5, 7), (16, 32), (65, 33), (100, 511), (70, 513), (130, 1024), (64, 1025), (33, 2600)]
EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}


def make(n, k, dtype, rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=g).to(dtype) for s in ((rows, k), (n, k), (n,))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,k", SHAPES)
def test_accuracy(ops, dtype, n, k):
    x, w, b = make(n, k, dtype, 13)
    packed = ops.gemm_pack(w)
    for bias in (None, b):
        want = x.double() @ w.double().T + (0 if bias is None else bias.double())
        got = ops.gemm(x, packed, n, k, bias)
        assert got.dtype == dtype and got.shape == (13, n)
        # The tolerance covers one rounding of the output and k fp32 roundings of sums of size sqrt(k).
        room = want.abs() * EPS[dtype] * 1.01 + k**0.5 * 2**-23 * 8 * (1 + k**0.5 / 8)
        assert ((got.double() - want).abs() <= room).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,k", [(65, 33), (200, 576), (70, 513), (34, 1024), (130, 1536), (40, 2112)])
def test_row_bits_do_not_depend_on_rows(ops, dtype, n, k):
    x, w, b = make(n, k, dtype, 300)
    packed = ops.gemm_pack(w)
    want = torch.cat([ops.gemm(x[i : i + 1], packed, n, k, b) for i in range(300)])
    for m in [*range(1, 65), 65, 95, 96, 97, 127, 128, 193, 300]:
        assert torch.equal(ops.gemm(x[:m], packed, n, k, b), want[:m]), m
    # At other places, beside other rows.
    other = torch.randn(300, k).to(dtype) * 100
    for at in (0, 1, 5, 6, 37, 299):
        other[at] = x[7]
        assert torch.equal(ops.gemm(other, packed, n, k, b)[at], want[7]), at


def test_row_bits_do_not_depend_on_bands_and_groups(ops):
    """Enough rows and outputs for several bands of rows and groups of the weight, beside few rows at a time."""
    x, w = torch.randn(500, 1536).bfloat16(), torch.randn(1500, 1536).bfloat16()
    packed = ops.gemm_pack(w)
    parts = [ops.gemm(part, packed, 1500, 1536, None) for part in x.split(40)]
    assert torch.equal(ops.gemm(x, packed, 1500, 1536, None), torch.cat(parts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [33, 64, 577])
def test_strides_and_dimensions(ops, dtype, k):
    n = 50
    x, w, b = make(n, k, dtype, 24)
    packed = ops.gemm_pack(w)
    want = ops.gemm(x, packed, n, k, b)
    wide = torch.full((24, k + 5), float("nan"), dtype=dtype)
    wide[:, 2 : k + 2] = x
    assert torch.equal(ops.gemm(wide[:, 2 : k + 2], packed, n, k, b), want)
    assert torch.equal(ops.gemm(x.T.contiguous().T, packed, n, k, b), want)
    assert torch.equal(ops.gemm(x.reshape(2, 3, 4, k), packed, n, k, b), want.reshape(2, 3, 4, n))
    assert torch.equal(ops.gemm(x[3], packed, n, k, b), want[3])
    assert torch.equal(ops.gemm_pack(w.T.contiguous().T), packed)
    assert ops.gemm(x[:0], packed, n, k, b).shape == (0, n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [576, 640, 1024])
def test_where_the_rows_lie_does_not_matter(ops, dtype, k):
    """AMX reads rows in place if they are aligned and do not share cache sets, and packs them otherwise."""
    n, m = 70, 75
    x, w, b = make(n, k, dtype, m)
    packed = ops.gemm_pack(w)
    want = ops.gemm(x, packed, n, k, b)
    for first, width in ((0, k + 32), (1, k + 1), (32, 2048)):
        held = torch.full((m, width), float("nan"), dtype=dtype)
        held[:, first : first + k] = x
        assert torch.equal(ops.gemm(held[:, first : first + k], packed, n, k, b), want), (first, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(ops, threads, dtype):
    for n, k, m in [
        (300, 576, 1),
        (300, 1536, 7),
        (65, 1025, 300),
        (200, 577, 64),
        (700, 40, 2000),
        (64, 576, 700),
        (70, 2200, 600),
    ]:
        x, w, b = make(n, k, dtype, m)
        packed = ops.gemm_pack(w)
        got = []
        for t in (1, 2, 3):
            threads(t)
            got.append(ops.gemm(x, packed, n, k, b))
        assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])


def canonical(x, w, b):
    """The product in the documented fp32 order, one FMA at a time (fp64 multiply-add, rounded to fp32)."""
    k = x.shape[1]
    block = 512 if k <= 1024 else 1024
    total = None
    for k0 in range(0, k, block):
        acc = torch.zeros(x.shape[0], w.shape[0])
        for i in range(k0, min(k, k0 + block)):
            acc = torch.addcmul(acc.double(), x[:, i : i + 1].double(), w[:, i].double()[None]).float()
        total = acc if total is None else total + acc
    return total + b


@pytest.mark.parametrize("k", [40, 511, 700, 1100])
def test_fp32_order_is_the_documented_one(ops, k):
    x, w, b = make(20, k, torch.float32, 4)
    got = ops.gemm(x, ops.gemm_pack(w), 20, k, b)
    want = canonical(x, w, b)
    # The emulated FMA rounds twice, which rarely gives another result: allow one such element.
    assert (got != want).sum() <= 1
    # The comparison detects another order: other blocks of K give other bits.
    if k == 1100:
        half = canonical(x[:, :1000], w[:, :1000], b)  # blocks that end at other places
        assert (half + (x[:, 1000:] @ w[:, 1000:].T) != got).any()


def test_onednn_route_has_the_same_bits(ops, isa):
    """On AVX512_BF16, vLLM's oneDNN GEMM cuts K at the same places, except for M = 1 with K > 1024."""
    pytest.importorskip("vllm")
    if isa != "avx512_bf16":
        pytest.skip("oneDNN's order was matched on AVX512_BF16")
    from vllm import _custom_ops

    if not _custom_ops._supports_onednn:
        pytest.skip("this vllm has no oneDNN GEMM")
    for dtype in (torch.bfloat16, torch.float32):
        for n, k in [(96, 100), (192, 576), (64, 1024), (128, 1100), (576, 1536)]:
            x, w, b = make(n, k, dtype, 70)
            handler, packed = _custom_ops.create_onednn_mm(w.T, 32), ops.gemm_pack(w)
            for m in (2, 8, 70):
                for bias in (None, b):
                    ours = ops.gemm(x[:m], packed, n, k, bias)
                    assert torch.equal(ours, _custom_ops.onednn_mm(handler, x[:m], bias)), (dtype, n, k, m)


def test_refusals(ops):
    w = torch.randn(8, 16)
    packed = ops.gemm_pack(w)
    x = torch.randn(2, 16)
    for bad, what in [
        (lambda: ops.gemm(torch.randn(2, 15), packed, 8, 16, None), "K=16"),
        (lambda: ops.gemm(x.bfloat16(), packed, 8, 16, None), "packed weight"),
        (lambda: ops.gemm(x, w, 8, 16, None), "pack it"),
        (lambda: ops.gemm(x, packed, 8, 16, torch.randn(7)), "bias"),
        (lambda: ops.gemm_pack(torch.randn(8)), r"\[N, K\]"),
        (lambda: ops.gemm_pack(torch.randn(0, 8)), "empty"),
        (lambda: ops.gemm_pack(torch.randn(2, 8).double()), "float32"),
    ]:
        with pytest.raises(RuntimeError, match=what):
            bad()
