"""On a GPU with FP8: a scaled product gives a row the same bits in any batch, near fp64, by certificate and without."""

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no CUDA GPU with FP8"
    ),
]
EIGHTH = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def ops():
    from bi_patch.ops.cuda import machine, scaled_linear

    machine.forbid_split_k()
    scaled_linear.define_op()


def operands(rows, n, k, group):
    generator = torch.Generator("cuda").manual_seed(n)

    def scales(*sizes):
        return torch.rand(sizes, generator=generator, device="cuda") * 0.02 + 0.001

    x, w = (torch.randn(m, k, generator=generator, device="cuda").mul_(8).to(EIGHTH) for m in (rows, n))
    if not group:
        return x, w, scales(rows, 1), scales(n, 1)
    return x, w, scales(k // 128, rows).t(), scales(-(-n // 128), k // 128)


def exact(x, w, x_scale, w_scale, group):
    n, k = w.shape
    if group:
        x_scale = x_scale.double().repeat_interleave(128, 1)
        w_scale = w_scale.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)
    return (x.double() * x_scale) @ (w.double() * w_scale).T


@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)])
def test_a_row_has_its_bits_in_any_batch(group, dtype, bias, tmp_path):
    from bi_patch.ops.cuda import scaled_linear

    n, k = 1280, 2048
    problem = scaled_linear.Problem(n, k, dtype, bias, group)
    (first,) = scaled_linear.certify([problem], 600, tmp_path)
    (again,) = scaled_linear.certify([problem], 600, tmp_path)
    # With a bias the library is not asked, and the bundled variants that agree are listed.
    assert first == again and first.algorithms and bool(first.evidence.compared) is not bias
    x, w, x_scale, w_scale = operands(700, n, k, group)
    held = torch.randn(n, device="cuda", dtype=dtype) if bias else None
    product = torch.ops.bi_patch.scaled_linear
    whole = product(x, w, x_scale, w_scale, held, group, dtype, False)
    want = exact(x, w, x_scale, w_scale, group) + (held.double() if bias else 0)
    assert (whole.double() - want).norm() / want.norm() < 1e-2
    for at, m in ((0, 1), (3, 2), (0, 4), (8, 16), (1, 17), (0, 64), (0, 65), (100, 128), (0, 600), (0, 601)):
        part = slice(at, at + m)
        got = product(x[part], w, x_scale[part], w_scale, held, group, dtype, False)
        assert torch.equal(got, whole[part]), (at, m)


@pytest.mark.parametrize(("n", "k"), [(1280, 2048), (6144, 4096)])
@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)])
def test_static_activations(n, k, dtype, bias, tmp_path):
    from bi_patch.ops.cuda import scaled_linear

    pytest.importorskip("vllm._custom_ops", reason="vLLM is not installed")
    from bi_patch.seams.cuda.scaled_linear import _cutlass

    scaled_linear.hand(_cutlass(), static=True)
    problem = scaled_linear.Problem(n, k, dtype, bias, 0, True)
    (certificate,) = scaled_linear.certify([problem], 1100, tmp_path)
    handed = list(scaled_linear._own(scaled_linear._HANDED))
    if torch.cuda.get_device_capability() == (9, 0):
        assert (handed in certificate.algorithms) is not bias
    x, w, _, w_scale = operands(1100, n, k, 0)
    x_scale, held = (
        torch.full((1,), 0.0123, device="cuda"),
        torch.randn(n, device="cuda", dtype=dtype) if bias else None,
    )
    product = torch.ops.bi_patch.scaled_linear
    at_once = product(x, w, x_scale, w_scale, held, 0, dtype, True)
    scaled_linear.keep(x_scale, w_scale, n)
    whole = product(x, w, x_scale, w_scale, held, 0, dtype, True)
    assert torch.equal(at_once, whole)
    want = exact(x, w, x_scale, w_scale, 0) + (held.double() if bias else 0)
    assert (whole.double() - want).norm() / want.norm() < 1e-2
    for m in (*range(1, 67), 96, 127, 128, 129, 200, 256, 500, 512, 513, 700, 1024):
        for at in (0, 1100 - m):
            part = slice(at, at + m)
            assert torch.equal(product(x[part], w, x_scale, w_scale, held, 0, dtype, True), whole[part]), (at, m)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = product(x[:64], w, x_scale, w_scale, held, 0, dtype, True)
    x_scale.mul_(0.5)
    scaled_linear.keep(x_scale, w_scale, n)  # in place: the graph reads the new products
    graph.replay()
    assert torch.equal(out, product(x[:64], w, x_scale, w_scale, held, 0, dtype, True))
    assert not torch.equal(out, whole[:64])


@pytest.mark.parametrize("group", [0, 128])
def test_every_bundled_tile(group):
    from bi_patch.kernels.triton import scaled_gemm
    from bi_patch.ops import bits
    from bi_patch.ops.cuda import machine

    x, w, x_scale, w_scale = operands(1100, 1152, 1536, group)
    if not group:
        x_scale, w_scale = x_scale.view(-1), w_scale.view(-1)
    shared = machine.shared_memory()
    reference = scaled_gemm.fit(scaled_gemm.REFERENCE, shared)
    want = scaled_gemm.gemm(x, w, x_scale, w_scale, None, torch.bfloat16, reference)
    described = (False, True) if machine.vendor_allowed() else (False,)
    for m in (1, 7, 16, 17, 33, 64, 65, 512, 513, 1100):
        for descriptors in described:
            tile = scaled_gemm.choose(m, 1152, shared, descriptors)
            got = scaled_gemm.gemm(x[:m], w, x_scale[:m], w_scale, None, torch.bfloat16, tile)
            assert not bits.differing(got, want[:m]), (m, tile)
