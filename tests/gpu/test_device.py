"""On a GPU: certificates are made and read back, and every kernel gives a row the same bits in any batch."""

import itertools

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.fixture(autouse=True)
def ops():
    from bi_patch.ops.cuda import linear, machine, norm, rotary

    machine.forbid_split_k()
    linear.define_op()
    norm.define_ops()
    rotary.define_op()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear(dtype, bias, tmp_path):
    from bi_patch.ops.cuda import linear

    problem = linear.Problem(512, 1024, dtype, bias)
    (first,) = linear.certify([problem], 600, tmp_path)
    (again,) = linear.certify([problem], 600, tmp_path)
    assert first == again
    assert first.evidence.compared
    weight = torch.randn(512, 1024, device="cuda", dtype=dtype) / 32
    held = torch.randn(512, device="cuda", dtype=dtype) if bias else None
    x = torch.randn(700, 1024, device="cuda", dtype=dtype)
    whole = torch.ops.bi_patch.linear(x, weight, held)
    want = x.double() @ weight.double().T + (held.double() if bias else 0)
    assert (whole.double() - want).norm() / want.norm() < {2: 5e-3, 4: 1e-5}[x.element_size()]
    for m in (1, 2, 17, 128, 129, 600, 601):
        assert torch.equal(torch.ops.bi_patch.linear(x[:m], weight, held), whole[:m])
    assert torch.equal(torch.ops.bi_patch.linear(x[333:334], weight, held), whole[333:334])


@pytest.mark.alone
def test_linear_by_the_fastest_algorithm(tmp_path):
    """For this size, the library's first offer is not always the fastest. The served algorithm gives the reference's
    bits and is no slower than the first offer."""
    from bi_patch.ops import bits
    from bi_patch.ops.cuda import linear, machine, timing
    from bi_patch.ops.zero_sums import cancelling

    n, k, rows = 2048, 8192, 1024
    problem = linear.Problem(n, k, torch.bfloat16, False)
    (certificate,) = linear.certify([problem], rows, tmp_path)
    (again,) = linear.certify([problem], rows, tmp_path)
    assert certificate == again
    generator = torch.Generator("cuda").manual_seed(1)
    order = torch.randperm(k, generator=generator, device="cuda")
    x = cancelling(rows, order, 1, generator, torch.bfloat16)
    weight = cancelling(n, order, -1, generator, torch.bfloat16)
    weight[1::2].abs_().mul_(0.125)
    want = linear.bundled(x, weight, None, False)
    for m in range(1, rows + 1):
        assert not bits.differing(torch.ops.bi_patch.linear(x[:m], weight, None), want[:m]), m
    if not machine.vendor_allowed():
        return
    assert certificate.passed and 192 in certificate.preferred
    route = linear.routes()[problem]
    weights = [weight.clone() for _ in range(2 * machine.cache_bytes() // weight.nbytes + 1)]
    ways = [
        [lambda w=w, offer=offer: linear._vendor(route.gemm, offer, x[:192], w, None) for w in weights]
        for offer in (route.gemm.offers(192)[0], route.algorithm(192))
    ]
    first, served = timing.microseconds(ways)
    assert served <= 1.1 * first, (served, first)


@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, True), (torch.float16, False)])
def test_every_bundled_tile(dtype, bias):
    """Every variant that `choose` may return gives the reference's bits, for sizes that no tile divides."""
    from bi_patch.kernels.triton import gemm
    from bi_patch.ops import bits
    from bi_patch.ops.cuda import machine

    limits = machine.shared_memory(), machine.processors()
    weight = torch.randn(1032, 1544, device="cuda", dtype=dtype) / 40
    held = torch.randn(1032, device="cuda", dtype=dtype) if bias else None
    x = torch.randn(4100, 1544, device="cuda", dtype=dtype)
    want = gemm.gemm(x, weight, held, gemm.REFERENCE)
    tiles = {
        part.tile
        for m in range(1, 4100)
        for n in (2048, 8192, 24576)
        for descriptors in ((False, True) if machine.vendor_allowed() else (False,))
        for part in gemm.choose(m, n, 1544, 2, *limits, descriptors)
    }
    assert not machine.vendor_allowed() or tiles >= {gemm.fit(tile, 2, limits[0]) for tile in gemm.WAVES}
    for tile in tiles:
        for m in (1, 7, 64, 100, 300, 4100):
            assert not bits.differing(gemm.gemm(x[:m], weight, held, tile), want[:m]), (tile, m)
    for first, rest in itertools.pairwise(sorted(tiles)):
        parts = gemm.Part(first, 256), gemm.Part(rest, 1032)
        assert not bits.differing(gemm.product(x[:300], weight, held, parts), want[:300]), parts


def test_norm_and_rotation():
    x = torch.randn(300, 2048, device="cuda", dtype=torch.bfloat16)
    residual, weight = torch.randn_like(x), torch.randn(2048, device="cuda", dtype=torch.bfloat16)
    whole = torch.ops.bi_patch.add_rms_norm(x, residual, weight, 1e-6, 0.0)
    positions = torch.arange(300, device="cuda")
    cache = torch.randn(300, 128, device="cuda", dtype=torch.bfloat16)
    qk = torch.ones(128, device="cuda", dtype=torch.bfloat16)
    rotated = torch.ops.bi_patch.rope(positions, x, residual[:, :512], cache, 128, qk, qk, 1e-6)
    for at, m in ((0, 1), (5, 255), (7, 256), (0, 257)):
        part = slice(at, at + m)
        alone = torch.ops.bi_patch.add_rms_norm(x[part], residual[part], weight, 1e-6, 0.0)
        assert all(torch.equal(a, w[part]) for a, w in zip(alone, whole, strict=True))
        turned = torch.ops.bi_patch.rope(positions[part], x[part], residual[part, :512], cache, 128, qk, qk, 1e-6)
        assert all(torch.equal(a, w[part]) for a, w in zip(turned, rotated, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("cols", [64, 768, 4544, 8192])
def test_layer_norm(dtype, cols):
    """A row alone has the bits that it has among others, in eager and in compiled code. Its values are right."""
    from bi_patch.seams.cuda import norm

    generator = torch.Generator("cuda").manual_seed(cols)
    x = torch.randn(300, cols, device="cuda", generator=generator).to(dtype)
    model = torch.nn.Sequential(torch.nn.LayerNorm(cols)).to("cuda", dtype)
    for weight in model.parameters():
        weight.data = torch.randn(cols, device="cuda", generator=generator).to(dtype)
    want = torch.nn.functional.layer_norm(x.double(), (cols,), *(p.double() for p in model.parameters()), 1e-5)
    norm.replace_layer_norms(model)
    with torch.inference_mode():
        whole = model(x)
        assert (whole.double() - want).norm() / want.norm() < (1e-5 if dtype == torch.float32 else 5e-3)
        compiled = torch.compile(model, dynamic=True)
        for at, m in ((0, 1), (5, 255), (7, 256), (0, 257)):
            assert torch.equal(model(x[at : at + m]), whole[at : at + m])
            assert torch.equal(compiled(x[at : at + m]), whole[at : at + m])


def test_pytorch_own_products_and_sums():
    """With the overrides, every form gives a row the same bits alone and in a batch, also in compiled code."""
    from bi_patch.ops.cuda import aten

    aten.override()
    x = torch.randn(300, 1024, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1024, 512, device="cuda", dtype=torch.bfloat16) / 32
    bias = torch.randn(512, device="cuda", dtype=torch.bfloat16)

    def out_form(rows):
        return torch.mm(rows, weight, out=torch.empty(len(rows), 512, device="cuda", dtype=torch.bfloat16))

    forms = {
        "mm": lambda rows: rows @ weight,
        "mm.out": out_form,
        "mm.dtype": lambda rows: torch.mm(rows, weight, out_dtype=torch.float32),
        "addmm": lambda rows: torch.addmm(bias, rows, weight, alpha=0.5),
        "linear": lambda rows: torch.nn.functional.linear(rows, weight.t(), bias),
        "bmm": lambda rows: torch.bmm(rows[:, None], weight.expand(len(rows), 1024, 512))[:, 0],
        "sum": lambda rows: rows.sum(-1),
        "mean": lambda rows: rows.float().mean(-1),
        "softmax": lambda rows: rows.softmax(-1),
        "log_softmax": lambda rows: rows.float().log_softmax(-1),
        "compiled": torch.compile(lambda rows: torch.addmm(bias, rows, weight).relu() @ weight.t(), dynamic=True),
    }
    for name, form in forms.items():
        whole = form(x)
        for at, m in ((0, 1), (7, 2), (30, 33), (44, 256)):
            assert torch.equal(form(x[at : at + m]), whole[at : at + m]), (name, m)
    a, b = torch.rand(3, 40, 64, device="cuda"), torch.rand(3, 64, 50, device="cuda")
    want = a.double() @ b.double()
    assert (torch.bmm(a, b).double() - want).norm() / want.norm() < 1e-6  # not TF32
    assert torch.equal(torch.bmm(a[1:2], b[1:2])[0], torch.bmm(a, b)[1])
    positions = torch.arange(5000.0, device="cuda")[None, None]
    assert torch.equal((a[:1, :, :1] @ positions)[0], a[0, :, :1] * positions[0])
    assert torch.bmm(a[:0], b[:0]).shape == (0, 40, 50)
    want = x.double() @ weight.double()
    assert (forms["mm.dtype"](x).double() - want).norm() / want.norm() < 1e-5
    assert torch.ones(3, 4, device="cuda", dtype=torch.int32).sum(-1).tolist() == [4, 4, 4]


def test_certificates_of_a_worker(tmp_path, monkeypatch):
    """The certificates of linears, experts' tiles and decode attention, as for a loaded model: each passes and is
    saved."""
    pytest.importorskip("vllm.model_executor.layers.fused_moe.fused_moe", reason="vLLM is not installed")
    from types import SimpleNamespace

    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from bi_patch.ops import certificates
    from bi_patch.ops.cuda import attention, certify, linear, machine, moe
    from bi_patch.seams.cuda.attention import prefill
    from bi_patch.seams.cuda.moe import experts

    if not machine.vendor_allowed():
        pytest.skip("FlashAttention 3 and cuBLASLt's order need Hopper")
    monkeypatch.setattr(moe, "_done", set())
    monkeypatch.setattr(moe, "_passed", {})
    monkeypatch.setattr(attention, "_certified", {})
    model = torch.nn.Module()
    model.layer = torch.nn.Module()
    for name, shape in (("w13_weight", (1, 1536, 2048)), ("w2_weight", (1, 2048, 768))):
        weight = torch.empty(shape, device="cuda", dtype=torch.bfloat16).expand(128, -1, -1)
        model.layer.register_buffer(name, weight)
    model.layer.moe_config = SimpleNamespace(experts_per_token=8, activation=MoEActivation.SILU)
    products = [linear.Problem(512, 1024, torch.bfloat16, False)]
    decoders = [(attention.Problem(32, 8, size, torch.bfloat16), prefill) for size in (64, 128)]

    def make():
        given = (products * 2, experts(model), decoders * 2, [], [])
        return certify.certify(*given, max_rows=600, library="test", cache=tmp_path)

    made = make()
    operations = ["cuda.linear", "cuda.moe", "cuda.decode_attention", "cuda.decode_attention"]
    assert [c.key.operation for c in made] == operations
    for certificate in made:
        assert certificate.passed and certificate.evidence.compared, certificate
        assert certificates.load(tmp_path, certificate.key) == certificate
    assert products[0] in linear.routes() and all(attention.serves(problem) for problem, _ in decoders)
    assert all(moe._passed.values())
    assert make() == made[:1]  # this process has certified the others already
