"""Paged attention on CPU: its accuracy, and equal bits for a row in any batch."""

import itertools
from dataclasses import dataclass

import pytest
import torch

from bi_patch.ops import bits

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROOM = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 5e-6}


@dataclass
class Seq:
    """One request's whole sequence: q [len, H, D], k and v [len, KH, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def seq(n, h, kh, d, dtype, seed=0):
    g = torch.Generator().manual_seed(seed * 1000 + n)
    return Seq(*(torch.randn(n, x, d, generator=g).to(dtype) for x in (h, kh, kh)))


def run(ops, parts, window=-1, cap=0.0, bs=32, seed=0, spare=3, causal=True):
    """Attention over `parts`, each (Seq, first query position, end); returns a list of outputs.

    Each request gets random blocks of a cache full of NaN. So a NaN shows a read of a slot that was not stored.
    """
    s0 = parts[0][0]
    kh, d, dtype = s0.k.shape[1], s0.q.shape[2], s0.q.dtype
    need = [-(-end // bs) for _, _, end in parts]
    total = sum(need) + spare
    ids = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).int()
    kv = torch.full((total, kh, bs, 2 * d), float("nan"), dtype=dtype)
    table = torch.full((len(parts), max(need) + 1), total - 1, dtype=torch.int32)
    at = 0
    for r, n in enumerate(need):
        table[r, :n] = ids[at : at + n]
        at += n
    for r, (s, _, end) in enumerate(parts):
        pos = torch.arange(end)
        slots = table[r, pos // bs].long() * bs + pos % bs
        ops.kv_store(s.k[:end], s.v[:end], kv, slots)
    q = torch.cat([s.q[first:end] for s, first, end in parts])
    counts = [end - first for _, first, end in parts]
    start = torch.tensor([0, *counts]).cumsum(0).int()
    lens = torch.tensor([end for _, _, end in parts], dtype=torch.int32)
    out = torch.full_like(q, float("nan"))
    ops.attention(out, q, kv, start, lens, table, d**-0.5, window, cap, causal)
    return list(out.split(counts))


def exact(s, window=-1, cap=0.0, causal=True):
    """float64 attention of every token of `s`."""
    n, h, d = s.q.shape
    k, v = (x.double().repeat_interleave(h // s.k.shape[1], 1) for x in (s.k, s.v))
    w = torch.einsum("qhd,khd->hqk", s.q.double(), k) * d**-0.5
    if cap:
        w = cap * torch.tanh(w / cap)
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    seen = ((j <= i) | (not causal)) & ((window < 0) | ((j >= i - window) & (j <= i + window)))
    return torch.einsum("hqk,khd->qhd", w.masked_fill(~seen, float("-inf")).softmax(-1), v)


def same(a, b):
    return not bits.differing(a, b)


MODELS = [(2, 2, 64), (9, 3, 64), (4, 1, 80), (8, 1, 128), (3, 1, 96), (4, 2, 256), (2, 1, 16), (1, 1, 512)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_accuracy(ops, dtype, model):
    for n, window, cap in [
        (1, -1, 0.0),
        (300, -1, 0.0),
        (531, -1, 5.0),
        (300, 0, 0.0),
        (531, 37, 0.0),
        (531, 300, 2.0),
    ]:
        s = seq(n, *model, dtype)
        got = run(ops, [(s, 0, n)], window, cap)[0]
        assert (got.double() - exact(s, window, cap)).abs().max() <= ROOM[dtype], (n, window, cap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", [(9, 3, 64), (4, 1, 80), (8, 1, 96)], ids=str)
@pytest.mark.parametrize("window,cap", [(-1, 0.0), (100, 0.0), (-1, 4.0)])
def test_decode_and_chunks_equal_the_whole_prefill(ops, dtype, model, window, cap):
    n = 530
    s = seq(n, *model, dtype)
    whole = run(ops, [(s, 0, n)], window, cap)[0]
    assert whole.isfinite().all()
    # Decode: many single-token requests at once, and some alone.
    edges = {e + x for e in (16, 32, 128, 256, 512) for x in (-1, 0, 1, 2)}
    ends = sorted(edges | {1, 2, 3, 100, 101, n})
    for end, got in zip(ends, run(ops, [(s, e - 1, e) for e in ends], window, cap, seed=1), strict=True):
        assert same(got, whole[end - 1 : end]), end
    for end in (1, 17, 256, 257, 513, n):
        assert same(run(ops, [(s, end - 1, end)], window, cap, seed=2)[0], whole[end - 1 : end]), end
    for chunk in (7, 16, 33, 128, 255, 256, 300):
        parts = [(s, a, min(n, a + chunk)) for a in range(0, n, chunk)]
        assert same(torch.cat(run(ops, parts, window, cap, seed=chunk)), whole), chunk
    for a, b in [(0, 5), (250, 262), (511, 530), (129, 400)]:  # one request alone
        assert same(run(ops, [(s, a, b)], window, cap, seed=a)[0], whole[a:b]), (a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bs", [16, 48, 128])
def test_neighbours_order_and_blocks_do_not_matter(ops, dtype, bs):
    model = (6, 2, 64)
    seqs = [seq(n, *model, dtype, seed=7) for n in (1, 15, 33, 257, 300, 641)]
    parts = [(s, max(0, len(s.q) - n), len(s.q)) for s, n in zip(seqs, (1, 15, 1, 100, 1, 3), strict=True)]
    alone = [run(ops, [p], bs=bs, seed=i)[0] for i, p in enumerate(parts)]
    for seed in range(4):
        order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
        got = run(ops, [parts[i] for i in order], bs=bs, seed=seed, spare=1 + seed)
        assert all(same(g, alone[i]) for i, g in zip(order, got, strict=True))
    # Another block size puts the same keys at other places.
    assert all(same(run(ops, [p], bs=32)[0], a) for p, a in zip(parts, alone, strict=True))
    # Other requests with huge, infinite or NaN values must not reach this request's output.
    bad = seq(70, *model, dtype, seed=9)
    bad.k[::3], bad.v[1::3], bad.v[2::3] = float("inf"), float("nan"), 1e4
    got = run(ops, [(bad, 0, 70), *parts, (bad, 69, 70)], bs=bs)
    assert all(same(g, a) for g, a in zip(got[1:-1], alone, strict=True))


@pytest.mark.parametrize("ratio", range(1, 9))
def test_a_decode_beside_prefills_of_9_and_10_tokens(ops, threads, ratio):
    """vLLM 51902 and 47069: query heads per KV head from 1 to 8, heads of 64, a long context."""
    threads(2)
    for dtype in (torch.bfloat16, torch.float32):
        victim = (seq(1203, 2 * ratio, 2, 64, dtype), 1202, 1203)
        alone = run(ops, [victim])[0]
        for count in (9, 10):
            neighbour = (seq(count, 2 * ratio, 2, 64, dtype, seed=3), 0, count)
            assert same(run(ops, [victim, neighbour])[0], alone), (dtype, count)
            assert same(run(ops, [neighbour, victim])[1], alone), (dtype, count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(ops, threads, dtype):
    model = (4, 1, 64)
    long, short = seq(2100, *model, dtype), seq(90, *model, dtype)
    batches = [
        [(long, 2099, 2100)],  # threads share the leaves of one query
        [(long, 2090, 2100), (short, 89, 90)],
        [(long, 1900, 2100), (short, 0, 90)],  # threads share the units of work
        [(short, i, i + 1) for i in range(90)],
    ]
    for parts in batches:
        got = []
        for t in (1, 2, 3):
            threads(t)
            got.append(torch.cat(run(ops, parts)))
        assert same(got[0], got[1]) and same(got[0], got[2])
    threads(1)
    serial = run(ops, [(long, 2000, 2100)])[0]
    threads(2)
    for end in (2001, 2049, 2100):
        assert same(run(ops, [(long, end - 1, end)])[0], serial[end - 2001 : end - 2000])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_window_is_read(ops, dtype):
    """vLLM may free blocks that lie left of the window, so their contents must not matter."""
    model, n, bs, window = (3, 1, 64), 400, 32, 70
    s = seq(n, *model, dtype)
    want = run(ops, [(s, 0, n)], window)[0]
    hole = Seq(s.q, s.k.clone(), s.v.clone())
    for first in (390, 391, 399):
        cut = first - window  # first key that position `first` sees
        hole.k[:cut], hole.v[:cut] = float("nan"), float("nan")
        assert same(run(ops, [(hole, first, n)], window, bs=bs)[0], want[first:]), first


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [-1, 70])
def test_a_value_that_is_not_finite_reaches_no_row_before_it(ops, threads, dtype, window):
    """Other requests read the cached rows before it. Prefills and decode give the same rows, on all threads."""
    model, n = (6, 2, 64), 600
    clean, at = seq(n, *model, dtype), (3, 259, 530)
    want = run(ops, [(clean, 0, n)], window)[0]
    for place, wrong in itertools.product(at, (float("inf"), float("nan"))):
        bad = Seq(clean.q, clean.k.clone(), clean.v.clone())
        bad.k[place], bad.v[place] = 0.0, wrong
        zero = Seq(clean.q, bad.k, clean.v)
        last = n if window < 0 else place + window + 1
        for first, end, count in ((0, n, 1), (0, n, 3), (place - 3, place + 1, 2), (place - 3, min(n, place + 40), 3)):
            threads(count)
            got = run(ops, [(bad, first, end)], window)[0]
            assert same(got[: place - first], want[first:place]), (place, wrong, first)
            assert not got[place - first : last - first].isfinite().all(-1).any(), (place, wrong, first)
            assert same(got[last - first :], run(ops, [(zero, 0, n)], window)[0][last:end]), (place, wrong, first)


def test_strided_inputs_outputs_and_padding(ops):
    h, kh, d, n, bs = 4, 2, 64, 40, 16
    s = seq(n, h, kh, d, torch.bfloat16)
    want = run(ops, [(s, 0, n)], bs=bs)[0]
    qkv = torch.cat([s.q.reshape(n, -1), s.k.reshape(n, -1), s.v.reshape(n, -1)], 1)
    q, k, v = (x.reshape(n, -1, d) for x in qkv.split([h * d, kh * d, kh * d], 1))
    assert not q.is_contiguous()
    kv = torch.full((5, kh, bs, 2 * d), float("nan"), dtype=torch.bfloat16)
    table = torch.tensor([[4, 0, 2]], dtype=torch.int32)
    pos = torch.arange(n)
    slots = table[0, pos // bs].long() * bs + pos % bs
    # Padding slots store nothing, in the middle or at the end.
    slots = torch.cat([slots[:7], torch.tensor([-1]), slots[7:], torch.tensor([-1, -5])])
    row = torch.full((1, kh, d), float("nan"), dtype=torch.bfloat16)
    k, v = (torch.cat([x[:7], row, x[7:], row, row]) for x in (k, v))
    ops.kv_store(k, v, kv, slots)
    assert kv[1].isnan().all() and kv[3].isnan().all()
    big = torch.zeros(n + 3, h, 2 * d, dtype=torch.bfloat16)
    out = big[:, :, :d]
    start, lens = torch.tensor([0, n], dtype=torch.int32), torch.tensor([n], dtype=torch.int32)
    ops.attention(out, q, kv, start, lens, table, d**-0.5, -1, 0.0)
    assert same(out[:n], want)
    assert (out[n:] == 0).all() and (big[:, :, d:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store_by_groups_equals_store_by_token(ops, dtype):
    n, kh, d, bs = 70, 2, 48, 32
    k, v = (torch.randn(n, kh, d).to(dtype) for _ in "kv")
    slots = torch.arange(5, 5 + n)
    a, b = torch.zeros(3, kh, bs, 2 * d, dtype=dtype), torch.zeros(3, kh, bs, 2 * d, dtype=dtype)
    ops.kv_store(k, v, a, slots)
    for i in torch.randperm(n).tolist():
        ops.kv_store(k[i : i + 1], v[i : i + 1], b, slots[i : i + 1])
    assert same(a, b)


def test_empty_requests(ops):
    kv = torch.zeros(2, 1, 16, 32)
    q = torch.randn(1, 1, 16)
    out = torch.empty_like(q)
    start = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    lens = torch.tensor([0, 3, 9], dtype=torch.int32)
    ops.kv_store(torch.randn(3, 1, 16), torch.ones(3, 1, 16), kv, torch.arange(3))
    ops.attention(out, q, kv, start, lens, torch.zeros(3, 1, dtype=torch.int32), 1.0, -1, 0.0)
    assert (out - 1).abs().max() < 1e-6


def test_agrees_with_the_stock_kernel_and_its_window(ops):
    """vLLM's sliding_window counts the token itself, so window_left is sliding_window - 1."""
    pytest.importorskip("vllm")
    from vllm import _custom_ops

    if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
        pytest.skip("this vllm has no CPU attention")
    h, kh, d, n, bs = 4, 2, 64, 300, 32
    s = seq(n, h, kh, d, torch.float32)
    blocks = -(-n // bs)
    keys, values = torch.zeros(blocks, kh, 2 * bs, d).chunk(2, dim=2)
    start, lens = torch.tensor([0, n], dtype=torch.int32), torch.tensor([n], dtype=torch.int32)
    table = torch.arange(blocks, dtype=torch.int32)[None]
    _custom_ops.cpu_attn_reshape_and_cache(s.k, s.v, keys, values, torch.arange(n), "vec")
    for sliding in (-1, 1, 40):
        meta = _custom_ops.cpu_attn_get_scheduler_metadata(
            1, h, kh, d, lens, torch.float32, start, True, sliding, "vec", True
        )
        out = torch.empty_like(s.q)
        _custom_ops.cpu_attention_with_kv_cache(
            s.q, keys, values, out, start, lens, d**-0.5, True, None, sliding, table, 0.0, meta, None
        )
        left = sliding - 1 if sliding > 0 else -1
        torch.testing.assert_close(run(ops, [(s, 0, n)], left)[0], out, atol=1e-5, rtol=1e-4)


def test_refusals(ops):
    i32 = torch.int32

    def call(kv=(2, 1, 16, 32), q=(2, 1, 16), start=(0, 2), lens=(2,), table=((0,),), dtype=torch.float32, cap=0.0):
        query = torch.zeros(*q, dtype=dtype)
        ops.attention(
            torch.zeros_like(query),
            query,
            torch.zeros(*kv),
            torch.tensor(start, dtype=i32),
            torch.tensor(lens, dtype=i32),
            torch.tensor(table, dtype=i32),
            1.0,
            -1,
            cap,
        )

    call()
    for bad, what in [
        ({"kv": (2, 1, 16, 40)}, "head_dim"),
        ({"kv": (2, 1, 24, 32)}, "block_size"),
        ({"q": (2, 1, 32)}, "query"),
        ({"q": (2, 3, 16), "kv": (2, 2, 16, 32)}, "multiple of"),
        ({"dtype": torch.bfloat16}, "kv_cache is"),
        ({"lens": (1,)}, "query tokens"),
        ({"start": (0, 3), "lens": (3,)}, "query tokens"),
        ({"lens": (17,)}, "needs 2"),
        ({"table": ((2,),)}, "names block 2"),
        ({"cap": -1.0}, "softcap"),
    ]:
        with pytest.raises(RuntimeError, match=what):
            call(**bad)
    with pytest.raises(RuntimeError, match="past the cache"):
        ops.kv_store(torch.zeros(1, 1, 16), torch.zeros(1, 1, 16), torch.zeros(2, 1, 16, 32), torch.tensor([32]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [-1, 0, 20, 300])
def test_both_directions(ops, dtype, window):
    """An encoder's attention: close to fp64, and a sequence has the same bits alone, in company and on any threads."""
    seqs = [seq(n, 6, 2, 64, dtype, seed=i) for i, n in enumerate((1, 2, 17, 100, 256, 257, 700))]
    parts = [(s, 0, s.q.shape[0]) for s in seqs]
    together = run(ops, parts, window, causal=False)
    for s, part, got in zip(seqs, parts, together, strict=True):
        want = exact(s, window, causal=False)
        assert ((got.double() - want).abs() <= ROOM[dtype]).all()
        assert same(run(ops, [part], window, bs=64, causal=False)[0], got)


def test_both_directions_on_other_threads(ops, threads):
    parts = [(seq(n, 4, 4, 64, torch.float32), 0, n) for n in (40, 900)]
    want = run(ops, parts, causal=False)
    threads(3)
    for got, expected in zip(run(ops, parts[::-1], causal=False)[::-1], want, strict=True):
        assert same(got, expected)
    assert not same(run(ops, parts)[1], want[1])  # the causal form is another
