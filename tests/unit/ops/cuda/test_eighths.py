"""Steps over an e4m3 KV cache: prompts over a 16-bit copy, single queries over the pages, in any mixture, and each row
as if it were alone. PyTorch stands in for the kernels."""

import random
from types import SimpleNamespace

import pytest
import torch

from bi_patch.ops.cuda import attention, eighths
from bi_patch.seams.cuda import attention as attention_cuda
from bi_patch.seams.cuda import eighths as route

HEADS, KEY_HEADS, SIZE, PAGE = 4, 2, 64, 16
SCALES = torch.tensor([0.37, 1.3]), torch.tensor([1.9, 0.11])
PROBLEM = attention.Problem(HEADS, KEY_HEADS, SIZE, torch.bfloat16, torch.float8_e4m3fn)


def sixteenth(values, scales):
    """What e4m3 values [..., key heads, D] stand for."""
    return (values.float() * scales[:, None]).to(torch.bfloat16)


def row(q, keys, values, scale):
    """Attention of one query [heads, D] over keys and values [length, key heads, D] in 16 bits."""
    keys, values = (x.double().repeat_interleave(len(q) // x.shape[1], 1) for x in (keys, values))
    weights = (torch.einsum("hd,khd->hk", q.double(), keys) * scale).softmax(-1)
    return torch.einsum("hk,khd->hd", weights, values).to(q.dtype)


def paged(q, keys, values, out, starts, lengths, pages, scale):
    """Causal attention of each request over 16-bit pages, written to `out`; a request without keys gets zeros."""
    starts, lengths = starts.tolist(), lengths.tolist()
    for i, length in enumerate(lengths):
        held = [x[pages[i].long()].flatten(0, 1) for x in (keys, values)]
        new = starts[i + 1] - starts[i]
        for n in range(new):
            if length == 0:
                out[starts[i] + n] = 0
                continue
            have = length - new + n + 1
            out[starts[i] + n] = row(q[starts[i] + n], held[0][:have], held[1][:have], scale)


def widen(k, v, scales, table, lengths, owners, bases, keys, values):
    """What kernels/triton/eighths.py writes."""
    size = k.shape[1]
    for page, request in enumerate(owners.tolist()):
        for n in range(eighths.PAGE):
            token = (page - int(bases[request])) * eighths.PAGE + n
            for cache, scale, to in ((k, scales[0], keys), (v, scales[1], values)):
                real = token < int(lengths[request])
                held = cache[int(table[request, token // size]), token % size] if real else None
                to[page, n] = sixteenth(held, scale) if real else 0


@pytest.fixture
def kernels(monkeypatch):
    """The kernels on the CPU, and what ran: (kernel, queries, key heads, longest query)."""
    from bi_patch.kernels.triton import eighths as copies

    ran = []

    def attend(q, k, v, out, starts, lengths, pages, scale, longest, scales):
        ran.append(("decode", len(q), k.shape[2], longest))
        paged(q, sixteenth(k, scales[0]), sixteenth(v, scales[1]), out, starts, lengths, pages, scale)
        return True

    def flash(**given):
        ran.append(("flash", len(given["q"]), given["k"].shape[2], given["max_seqlen_q"]))
        assert given["k"].shape[1] == eighths.PAGE and given["k"].dtype == given["q"].dtype == torch.bfloat16
        assert given["scheduler_metadata"] is given["k_descale"] is given["v_descale"] is given["q_descale"] is None
        assert int(given["block_table"].max()) < len(given["k"])
        assert given["max_seqlen_k"] >= int(given["seqused_k"].max())
        names = ("q", "k", "v", "out", "cu_seqlens_q", "seqused_k", "block_table", "softmax_scale")
        paged(*(given[name] for name in names))

    monkeypatch.setattr(copies, "widen", widen)
    monkeypatch.setattr(attention, "attend", attend)
    monkeypatch.setattr(attention.machine, "processors", lambda: 1)  # no step is few queries
    monkeypatch.setitem(attention._certified, PROBLEM, True)
    monkeypatch.setattr(eighths, "_scratch", [])
    return SimpleNamespace(ran=ran, flash=flash)


def room_for(pages: int) -> None:
    """A scratch of so many pages of one key head, full of NaN: what was there before must not matter."""
    eighths._scratch[:] = []
    eighths.reserve(pages * 2 * eighths.PAGE * SIZE * 2, "cpu")
    eighths._scratch[0].fill_(0xFF)


def given_of(requests, seed=0):
    """A call of FlashAttention for requests of (cached, new) tokens, and what its rows should be."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [cached + new for cached, new in requests]
    blocks = max(-(-length // PAGE) for length in lengths)
    pages = torch.randperm(len(requests) * blocks, generator=generator).to(torch.int32).view(-1, blocks)
    cache = torch.randn(pages.numel(), KEY_HEADS, PAGE, 2 * SIZE, generator=generator).to(torch.float8_e4m3fn)
    k, v = cache.transpose(1, 2).split(SIZE, dim=-1)
    starts = torch.tensor([0, *(new for _, new in requests)]).cumsum(0).int()
    q = torch.randn(int(starts[-1]), HEADS, SIZE, generator=generator).to(torch.bfloat16)
    given = {
        **{"q": q, "k": k, "v": v, "out": torch.full_like(q, 7.0), "cu_seqlens_q": starts, "block_table": pages},
        **{"seqused_k": torch.tensor(lengths).int(), "max_seqlen_k": max(lengths), "softmax_scale": 0.3},
        **{"max_seqlen_q": max(new for _, new in requests), "causal": True, "window_size": None, "softcap": 0},
        **{"alibi_slopes": None, "s_aux": None, "scheduler_metadata": "schedule", "q_descale": torch.ones(1)},
    }
    for name, scale in zip(("k_descale", "v_descale"), SCALES, strict=True):
        given[name] = scale.expand(len(requests), -1)
    want = torch.empty_like(q)
    paged(
        q,
        sixteenth(k, SCALES[0]),
        sixteenth(v, SCALES[1]),
        want,
        starts,
        given["seqused_k"],
        pages,
        0.3,
    )
    return given, want


MIXED = [(40, 1), (0, 3), (130, 1), (7, 0), (100, 40), (0, 1), (3, 126), (20, 2), (128, 1)]


@pytest.mark.parametrize("requests", [MIXED, [(9, 1)] * 3, [(0, 130)], [(5, 1), (0, 1), (2, 9)], [(2, 9), (5, 1)]])
@pytest.mark.parametrize("pages", [40, 8, 4, 2])
def test_rows_know_nothing_of_their_step_or_of_the_scratch(kernels, requests, pages):
    room_for(pages)
    given, want = given_of(requests)
    attention_cuda._decode_or(kernels.flash)(**given)
    assert torch.equal(given["out"], want)
    singles = sum(new for _, new in requests if new == 1)
    decoded = [entry for entry in kernels.ran if entry[0] == "decode"]
    assert [entry[1] for entry in decoded] == ([singles] if singles else [])
    assert {entry[2] for entry in kernels.ran if entry[0] == "flash"} <= ({2} if pages > 3 else {1, 2})


def test_any_steps_are_the_same_rows(kernels):
    chance = random.Random(5)
    for seed in range(6):
        requests = [(chance.randrange(150), chance.choice((0, 1, 1, 1, 2, 17))) for _ in range(chance.randrange(2, 9))]
        if not any(new for _, new in requests):
            continue
        room_for(chance.choice((3, 6, 60)))
        given, want = given_of(requests, seed)
        attention_cuda._decode_or(kernels.flash)(**given)
        assert torch.equal(given["out"], want)


def test_few_queries_go_to_the_decode_kernel_together(kernels, monkeypatch):
    counts, most = [1, 3, 0, 2], [9, 9, 9, 9]
    starts, lengths = torch.tensor([0, 1, 4, 4, 6]).int(), torch.tensor(most).int()
    step = eighths.plan(counts, most, starts, lengths, KEY_HEADS, 10, True)
    assert not step.runs and step.singles.rows == slice(0, 6) and step.singles.starts.tolist() == [0, 1, 4, 4, 6]
    monkeypatch.setattr(attention.machine, "processors", lambda: 12)
    assert attention.quick(3, 6, 128, KEY_HEADS) and not attention.quick(3, 6, 64, KEY_HEADS)
    assert not attention.quick(3, 7, 128, KEY_HEADS) and not attention.quick(18, 6, 128, KEY_HEADS)


def test_runs_fill_the_scratch_and_groups_of_heads_serve_what_is_longer():
    def runs(most, counts=None, pages=8, key_heads=4):
        counts = counts or [2] * len(most)
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        step = eighths.plan(counts, most, starts, torch.tensor(most).int(), key_heads, pages)
        return [(run.requests, run.heads, len(run.owners)) for run in step.runs]

    assert runs([128, 128, 1]) == [((0, 2), 4, 2), ((2, 3), 4, 1)]
    assert runs([129, 1]) == [((0, 1), 4, 2), ((1, 2), 4, 1)]
    assert runs([384]) == [((0, 1), 2, 3)]
    assert runs([1024, 1]) == [((0, 1), 1, 8), ((1, 2), 4, 1)]
    assert runs([128, 9, 128], [2, 1, 2]) == [((0, 3), 4, 2)]  # the single query between them has no copy
    with pytest.raises(ValueError, match="1025 keys do not fit"):
        runs([1025])


def test_the_scratch_has_room_for_the_longest_request_and_is_bounded():
    from bi_patch.kernels.triton import eighths as copies

    assert copies.PAGE == eighths.PAGE
    page = 2 * eighths.PAGE * 128 * 2
    assert eighths.bytes_of(8, 128, 40960, 8192) == 384 * 8 * page
    assert eighths.bytes_of(8, 128, 65536, 8192) == eighths.MOST_BYTES < 576 * 8 * page
    assert eighths.bytes_of(1, 128, 8192, 2048) == (64 + 16) * page
    assert eighths.bytes_of(8, 128, 1 << 20, 8192) == 8192 * page
    assert eighths.bytes_of(2, 128, 100, 100) == (64 + 1) * 2 * page  # a certificate's prompt has thousands of tokens


def test_a_step_knows_its_plan_and_another_step_does_not(kernels):
    """The builder makes the plan from numbers on the host, and the layer's forward hands it on."""
    room_for(40)
    given, want = given_of(MIXED)
    plain = SimpleNamespace(max_query_len=126, num_reqs=len(MIXED), max_seq_len=200, seq_lens=given["seqused_k"])
    plain.query_start_loc = plain.query_start_loc_cpu = given["cu_seqlens_q"]
    plain.seq_lens_cpu_upper_bound = given["seqused_k"] + 3
    model = SimpleNamespace(dtype=torch.bfloat16)
    builder = SimpleNamespace(num_heads_q=HEADS, num_heads_kv=KEY_HEADS, headdim=SIZE, kv_cache_dtype=torch.uint8)
    builder.model_config = model
    assert route.reads(builder) and route.problem_of(builder) == PROBLEM and attention_cuda._decodes(builder)
    assert not route.reads(SimpleNamespace(kv_cache_dtype=torch.bfloat16))
    step = route.step_of(builder, plain)
    known = []

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output):
        known.append(route._now.step)
        attention_cuda._decode_or(kernels.flash)(**given)

    forward = route.with_step(forward)
    assert forward.bi_patch_eighths
    metadata = SimpleNamespace(bi_patch_step=step)
    forward(SimpleNamespace(kv_cache_dtype="fp8"), None, None, None, None, None, metadata, None)
    assert torch.equal(given["out"], want) and known == [step] and route._now.step is None


@pytest.mark.parametrize(
    ("changes", "certified", "said"),
    [
        ({}, False, "D=64 bfloat16 over float8_e4m3fn: its certificate failed.* --attention-backend TRITON_ATTN"),
        ({"softcap": 30.0}, True, "asks for more than plain causal attention"),
        ({"causal": False}, True, "asks for more than plain causal attention"),
        ({"window_size": [511, 0]}, True, "asks for more than plain causal attention"),
    ],
)
def test_nothing_else_serves_an_fp8_cache(kernels, changes, certified, said, monkeypatch):
    from bi_patch.errors import UnsupportedFeature

    room_for(40)
    monkeypatch.setitem(attention._certified, PROBLEM, certified)
    given, _ = given_of([(9, 1), (0, 5)])
    with pytest.raises(UnsupportedFeature, match=said):
        attention_cuda._decode_or(kernels.flash)(**given | changes)
    assert not kernels.ran and (given["out"] == 7).all()


def test_a_captured_step_of_several_tokens_and_an_unfit_call_are_errors(kernels, monkeypatch):
    from bi_patch.errors import UnsupportedFeature

    room_for(40)
    given, _ = given_of([(9, 1), (0, 5)])
    monkeypatch.setattr(route, "_captures", lambda: True)
    with pytest.raises(UnsupportedFeature, match="Use cudagraph_mode FULL_AND_PIECEWISE"):
        attention_cuda._decode_or(kernels.flash)(**given)
    monkeypatch.setattr(attention, "attend", lambda *given: False)
    with pytest.raises(UnsupportedFeature, match="does not take queries"):
        attention_cuda._decode_or(kernels.flash)(**given_of([(9, 1)])[0])


def wrong_scale(scales):
    return tuple(reversed(scales))


def one_scale(scales):
    return tuple(scale[:1].expand(KEY_HEADS) for scale in scales)


@pytest.mark.parametrize("fault", [wrong_scale, one_scale])
def test_a_copy_with_other_scales_is_seen(kernels, fault, monkeypatch):
    from bi_patch.kernels.triton import eighths as copies

    room_for(40)
    monkeypatch.setattr(copies, "widen", lambda k, v, scales, *rest: widen(k, v, fault(scales), *rest))
    given, want = given_of(MIXED)
    attention_cuda._decode_or(kernels.flash)(**given)
    own = [i for i, (_, new) in enumerate(MIXED) for _ in range(new) if new > 1]
    assert len(own) > 10 and not torch.equal(given["out"], want)


def test_a_stale_page_of_the_scratch_is_seen(kernels, monkeypatch):
    """Of two runs, the second reads what the first left if its copy is not made."""
    from bi_patch.kernels.triton import eighths as copies

    made = []

    def once(*given):
        made.append(1)
        if len(made) == 1:
            widen(*given)

    room_for(4)
    monkeypatch.setattr(copies, "widen", once)
    given, want = given_of([(100, 20), (100, 21), (90, 2)])
    attention_cuda._decode_or(kernels.flash)(**given)
    assert len(made) > 1 and torch.equal(given["out"][:20], want[:20]) and not torch.equal(given["out"], want)
