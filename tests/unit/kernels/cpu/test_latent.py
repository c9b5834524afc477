"""Attention over latents on CPU: its accuracy, and equal bits for a row in any batch, chunk and number of threads."""

import pytest
import torch

from bi_patch.ops import bits

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROOM = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 5e-6}
DIM, VALUE = 576, 512


def make(n, heads, dtype, seed=0):
    """One request: queries [n, heads, DIM] and latents [n, DIM]."""
    g = torch.Generator().manual_seed(seed * 1000 + n)
    return torch.randn(n, heads, DIM, generator=g).to(dtype), torch.randn(n, DIM, generator=g).to(dtype)


def run(ops, parts, bs=16, seed=0, spare=3):
    """Attention over `parts`, each ((queries, latents), first query position, end); returns a list of outputs.

    Each request gets random blocks of a cache full of NaN. So a NaN shows a read of a slot that was not stored.
    """
    heads, dtype = parts[0][0][0].shape[1], parts[0][0][0].dtype
    need = [-(-end // bs) for _, _, end in parts]
    total = sum(need) + spare
    ids = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).int()
    cache = torch.full((total, bs, DIM), float("nan"), dtype=dtype)
    table = torch.full((len(parts), max(need) + 1), total - 1, dtype=torch.int32)
    at = 0
    for r, n in enumerate(need):
        table[r, :n] = ids[at : at + n]
        at += n
    for r, ((_, latents), _, end) in enumerate(parts):
        pos = torch.arange(end)
        cache.view(-1, DIM)[table[r, pos // bs].long() * bs + pos % bs] = latents[:end]
    query = torch.cat([q[first:end] for (q, _), first, end in parts])
    counts = [end - first for _, first, end in parts]
    start = torch.tensor([0, *counts]).cumsum(0).int()
    lens = torch.tensor([end for _, _, end in parts], dtype=torch.int32)
    out = torch.full((len(query), heads, VALUE), float("nan"), dtype=dtype)
    ops.latent_attention(out, query, cache, start, lens, table, DIM**-0.5)
    return list(out.split(counts))


def exact(request):
    q, latents = (x.double() for x in request)
    n = len(q)
    w = torch.einsum("qhd,kd->hqk", q, latents) * DIM**-0.5
    seen = torch.arange(n)[None] <= torch.arange(n)[:, None]
    return torch.einsum("hqk,kd->qhd", w.masked_fill(~seen, float("-inf")).softmax(-1), latents[:, :VALUE])


def same(a, b):
    return not bits.differing(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "heads"), [(1, 16), (17, 3), (300, 2), (257, 1)])
def test_accuracy(ops, dtype, n, heads):
    request = make(n, heads, dtype)
    (got,) = run(ops, [(request, 0, n)])
    assert (got.double() - exact(request)).abs().max() < ROOM[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 4, 16])
def test_a_latent_that_is_not_finite_reaches_no_row_before_it(ops, threads, dtype, heads):
    n, place = 300, 259
    queries, latents = make(n, heads, dtype)
    (want,) = run(ops, [((queries, latents), 0, n)])
    for wrong in (float("inf"), float("nan")):
        bad = latents.clone()
        bad[place] = wrong
        for first, end, count in ((0, n, 1), (0, n, 3), (256, 262, 2), (255, 260, 3)):
            threads(count)
            (got,) = run(ops, [((queries, bad), first, end)])
            assert same(got[: place - first], want[first:place]), (wrong, first)
            assert not got[place - first :].isfinite().all(-1).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 4, 16, 40])
def test_a_row_keeps_its_bits(ops, threads, dtype, heads):
    """Chunks, decode, company, block sizes and threads do not change a row."""
    n = 300
    request = make(n, heads, dtype)
    (whole,) = run(ops, [(request, 0, n)])
    for first, end in [(0, 1), (0, 7), (7, 300), (255, 257), (256, 300), (299, 300), (100, 101)]:
        (part,) = run(ops, [(request, first, end)], bs=32, seed=first)
        assert same(part, whole[first:end]), (first, end)
    others = [(make(m, heads, dtype, 1), max(0, m - 3), m) for m in (5, 31, 290)]
    for count in (1, 2, 3):
        threads(count)
        _, alone, _, _ = run(ops, [others[0], (request, 298, n), *others[1:]], seed=count)
        assert same(alone, whole[298:])
        (again,) = run(ops, [(request, 0, n)], bs=128)
        assert same(again, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_by_head(ops, threads, dtype):
    """Each head's product is the bundled GEMM's, for every number of tokens, and takes strided rows."""
    heads, n, k = 5, 512, 48
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(heads, n, k, generator=g).to(dtype)
    packed = torch.stack([ops.gemm_pack(w) for w in weight])
    x = torch.randn(33, heads, k + 16, generator=g).to(dtype)[..., :k]
    want = torch.stack([ops.gemm(x[:, h], packed[h], n, k, None) for h in range(heads)], 1)
    for tokens, count in [(1, 1), (2, 3), (17, 2), (33, 2)]:
        threads(count)
        out = torch.full((tokens, heads, n + 64), float("nan"), dtype=dtype)
        ops.heads_gemm(out[..., :n], x[:tokens], packed)
        assert same(out[..., :n], want[:tokens])
        assert out[..., n:].isnan().all()


def test_bad_arguments(ops):
    request = make(3, 2, torch.float32)
    cache = torch.zeros(2, 16, DIM)
    start, lens = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    table = torch.zeros(1, 1, dtype=torch.int32)
    out = torch.empty(3, 2, VALUE)
    with pytest.raises(RuntimeError, match="names block 5 of 2"):
        ops.latent_attention(out, request[0], cache, start, lens, table + 5, 1.0)
    with pytest.raises(RuntimeError, match="multiples of 16"):
        ops.latent_attention(torch.empty(3, 2, 500), request[0], cache, start, lens, table, 1.0)
    with pytest.raises(RuntimeError, match="query is"):
        ops.latent_attention(out, request[0].half(), cache, start, lens, table, 1.0)
    with pytest.raises(RuntimeError, match="pack each"):
        ops.heads_gemm(torch.empty(3, 2, 8), torch.empty(3, 2, 16), torch.empty(2, 7))
