"""On a GPU with vLLM: the decode kernel gives the bits of FlashAttention 3's prefill, alone and in any batch."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, key_heads", [(32, 8), (16, 8), (8, 8), (14, 2), (64, 4)])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_certificate(size, heads, key_heads, dtype, tmp_path):
    from bi_patch.ops.cuda import attention
    from bi_patch.seams.cuda.attention import prefill

    attention._certified.clear()
    problem = attention.Problem(heads, key_heads, size, dtype)
    certificate = attention.certify(problem, prefill, "test", tmp_path)
    assert certificate.evidence.differing == 0, certificate.evidence.first
    assert attention.serves(problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, key_heads", [(32, 8), (8, 8), (14, 2), (64, 4)])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_certificate_over_an_e4m3_cache(size, heads, key_heads, dtype, tmp_path):
    from bi_patch.ops.cuda import attention, eighths
    from bi_patch.seams.cuda.eighths import prefill

    attention._certified.clear()
    eighths.reserve(eighths.bytes_of(key_heads, size, 8192, 2048))
    problem = attention.Problem(heads, key_heads, size, dtype, torch.float8_e4m3fn)
    certificate = attention.certify(problem, prefill, "test", tmp_path)
    assert certificate.evidence.differing == 0, certificate.evidence.first
    assert attention.serves(problem)


EIGHTHS = torch.float8_e4m3fn
# The type of a cache, and the scales of K and V.
CACHES = pytest.mark.parametrize(
    "held, scales",
    [(torch.bfloat16, None), (EIGHTHS, (0.7, 1.3)), (EIGHTHS, (1.0, 1.0)), (EIGHTHS, (1.0, 1.3))],
    ids=["16 bits", "e4m3", "e4m3, scales of 1", "e4m3, K's scale of 1"],
)


def scales_of(scales):
    """The scales that a call gets, one for all heads."""
    return {"scales": tuple(torch.full((), x, device="cuda").expand(8) for x in scales)} if scales else {}


def requests(number, size, page, blocks, held=torch.bfloat16):
    """q, K, V, starts and pages of `number` requests with 32 query heads, 8 key heads and `blocks` pages each."""
    # K and V of a token lie side by side, as in vLLM.
    cache = torch.randn(number * blocks, 8, page, 2 * size, device="cuda", dtype=torch.bfloat16).to(held)
    k, v = cache.transpose(1, 2).split(size, dim=-1)
    pages = torch.randperm(number * blocks, device="cuda").to(torch.int32).reshape(number, blocks)
    q = torch.randn(number, 32, size, device="cuda", dtype=torch.bfloat16)
    return q, k, v, torch.arange(number + 1, device="cuda", dtype=torch.int32), pages


def forget(k, v, pages, lengths):
    """Write NaN past the tokens of each request, where anything may lie."""
    page = k.shape[1]
    nan = float("nan")
    if k.element_size() == 1:
        k, v, nan = k.view(torch.uint8), v.view(torch.uint8), 0x7F
    for held, length in zip(pages.long(), lengths.tolist()):
        slots = torch.arange(length, len(held) * page, device=k.device)
        for x in (k, v):
            x[held[slots // page], slots % page] = nan


@CACHES
@pytest.mark.parametrize("page, size", [(16, 64), (128, 128), (1024, 64)])
def test_rows_of_any_batch_through_a_graph(page, size, held, scales):
    """Each replay of one graph has requests of other lengths; one request has length 0, one has no query token."""
    from bi_patch.kernels.cuda import decode

    torch.manual_seed(page)
    number, most = 40, 3000
    q, k, v, starts, pages = requests(number, size, page, -(-most // page), held)
    more = scales_of(scales)
    starts[-1] = number - 1
    lengths = torch.full((number,), 5, device="cuda", dtype=torch.int32)
    out, forms = torch.zeros_like(q), decode.serving(32, 8, size, q.dtype, 0, bool(more))
    decode.attend(q, k, v, out, starts, lengths, pages, size**-0.5, **more)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # clusters, where the device has them
        decode.attend(q, k, v, out, starts, lengths, pages, size**-0.5, form=forms[0], **more)
    for _ in range(3):
        lengths.copy_(torch.randint(0, most, (number,)))
        lengths[0] = 0
        out.fill_(7)
        graph.replay()
        assert (out[0] == 0).all() and (out[-1] == 7).all()
        for form in forms:
            again = torch.full_like(q, 7)
            decode.attend(q, k, v, again, starts, lengths, pages, size**-0.5, form=form, **more)
            assert torch.equal(again, out), form
        for i in range(1, number - 1):
            alone = torch.empty_like(q[:1])
            one = torch.tensor([0, 1], device="cuda", dtype=torch.int32)
            own = q[i : i + 1], k, v, alone, one, lengths[i : i + 1], pages[i : i + 1]
            decode.attend(*own, size**-0.5, **more)
            assert torch.equal(alone[0], out[i]), (i, int(lengths[i]))
    want = out.clone()
    forget(k, v, pages, lengths)
    graph.replay()
    assert torch.equal(out, want)


@CACHES
@pytest.mark.parametrize("size, number", [(64, 4), (128, 2), (256, 1)])
def test_long_requests_while_memory_is_busy(size, number, held, scales):
    """While memory is busy, messages between the blocks of a cluster overtake copies. The bits must not change."""
    from bi_patch.kernels.cuda import decode

    torch.manual_seed(size)
    page, blocks = 16, 2000
    q, k, v, starts, pages = requests(number, size, page, blocks, held)
    more = scales_of(scales)
    lengths = torch.full((number,), page * blocks, device="cuda", dtype=torch.int32)
    want = torch.empty_like(q)
    forms = decode.serving(32, 8, size, q.dtype, 0, bool(more))
    decode.attend(q, k, v, want, starts, lengths, pages, size**-0.5, form=forms[-1], **more)
    for form in forms:
        outs = [torch.empty_like(q) for _ in range(100)]
        for out in outs:
            decode.attend(q, k, v, out, starts, lengths, pages, size**-0.5, form=form, **more)
        assert sum(not torch.equal(out, want) for out in outs) == 0, form


@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_query_that_fp16_does_not_hold_changes_no_other_bit(size):
    """A head's bits are the same beside a head for which products are of bf16 numbers, over every e4m3 number."""
    from bi_patch.kernels.cuda import decode

    torch.manual_seed(size)
    number, page, blocks = 8, 16, 300
    q, k, _, starts, pages = requests(number, size, page, blocks, EIGHTHS)
    raw = torch.randint(0, 256, (number * blocks, page, 8, 2 * size), device="cuda", dtype=torch.uint8)
    raw[(raw & 127) == 127] = 0  # not NaN
    k, v = raw.view(EIGHTHS).split(size, dim=-1)
    q[:4] *= torch.exp2(torch.randint(-25, 3, q[:4].shape, device="cuda"))
    lengths = torch.arange(1, number + 1, device="cuda", dtype=torch.int32) * 599
    others = q.clone()
    others[:, ::4, 7] = 2.0**-90
    for form in decode.serving(32, 8, size, q.dtype, 0, True):
        outs = [torch.empty_like(q) for _ in range(2)]
        for given, out in zip((q, others), outs):
            decode.attend(given, k, v, out, starts, lengths, pages, 1e-3, form=form, **scales_of((1.0, 1.0)))
        for head in (1, 2, 3):
            assert torch.equal(*(out[:, head::4] for out in outs)), form


@pytest.mark.parametrize("size", [64, 128, 256])
def test_zeros_move_no_small_product_in_fp16(size):
    """Scores of small products, beside products of a large query with a zero key, and of a zero query with a large key:
    the same as beside a head for which products are of bf16 numbers, where a zero has the least exponent."""
    from bi_patch.kernels.cuda import decode

    torch.manual_seed(size)
    number, page, blocks = 8, 16, 300
    q, _, _, starts, pages = requests(number, size, page, blocks, EIGHTHS)
    raw = torch.randn(number * blocks, page, 8, 2 * size, device="cuda").to(EIGHTHS).view(torch.uint8)
    k, v = raw.view(EIGHTHS).split(size, dim=-1)
    keys = raw[..., :size]
    keys.copy_(torch.randint(1, 0x18, keys.shape, device="cuda") + torch.randint(0, 2, keys.shape, device="cuda") * 128)
    keys[..., ::16] = 0
    keys[..., 1::16] = 0x7E  # 448
    q = ((2 * q.sign() + q) * 2.0**-27).contiguous()
    q[..., ::16], q[..., 1::16] = 8.0, 0.0
    lengths = torch.arange(1, number + 1, device="cuda", dtype=torch.int32) * 599
    others = q.clone()
    others[:, ::4, 7] = 2.0**-90
    for form in decode.serving(32, 8, size, q.dtype, 0, True):
        outs = [torch.empty_like(q) for _ in range(2)]
        for given, out in zip((q, others), outs):
            decode.attend(given, k, v, out, starts, lengths, pages, 2.0**29, form=form, **scales_of((1.0, 1.0)))
        for head in (1, 2, 3):
            assert torch.equal(*(out[:, head::4] for out in outs)), form


@CACHES
@pytest.mark.parametrize("size, number", [(64, 4), (128, 2), (256, 1)])
def test_long_requests_beside_copies_of_another_stream(size, number, held, scales):
    """Copies of another stream take memory, caches and multiprocessors at the same time. The bits must not change."""
    from bi_patch.kernels.cuda import decode

    torch.manual_seed(size)
    page, blocks = 16, 2000
    q, k, v, starts, pages = requests(number, size, page, blocks, held)
    more = scales_of(scales)
    lengths = torch.full((number,), page * blocks, device="cuda", dtype=torch.int32)
    want = torch.empty_like(q)
    forms = decode.serving(32, 8, size, q.dtype, 0, bool(more))
    decode.attend(q, k, v, want, starts, lengths, pages, size**-0.5, form=forms[-1], **more)
    beside, source = torch.cuda.Stream(), torch.ones(8, 1 << 22, device="cuda")
    into = torch.empty_like(source)
    torch.cuda.synchronize()
    for form in forms:
        outs = [torch.empty_like(q) for _ in range(100)]
        for out in outs:
            with torch.cuda.stream(beside):
                for n in range(8):  # short ones: they leave multiprocessors to both streams
                    torch.add(source[n], 1, out=into[n])
            decode.attend(q, k, v, out, starts, lengths, pages, size**-0.5, form=form, **more)
        torch.cuda.synchronize()
        assert sum(not torch.equal(out, want) for out in outs) == 0, form
