"""Routes of quantized linears on CPU: certified numbers of rows, rows filled up and cut, and what serves otherwise."""

import gc
import weakref

import pytest
import torch

from bi_patch.errors import CertificateFailed
from bi_patch.ops import certificates
from bi_patch.ops.cpu import machine, quantized

N, K = 96, 128


@pytest.fixture(autouse=True)
def kernels(cache):
    machine.load_kernels(cache)


@pytest.fixture
def weight():
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def route(layer, vendor, weight, folder, scheme="W4A16 groups of 32", bias=None):
    return quantized.route(
        layer,
        scheme,
        vendor,
        lambda: weight,
        lambda: quantized.dequantized_product(weight),
        sizes=(N, K),
        dtype=weight.dtype,
        bias=bias,
        cache=folder,
        library="test 1",
    )


def alone_and_among(apply, dtype=torch.bfloat16, sizes=(1, 2, 7, 31, 33, 40, 64, 100, 511, 512, 513, 700)):
    x = torch.randn(777, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = apply(x, None)
    for m in sizes:
        assert torch.equal(apply(x[50 : 50 + m], None), whole[50 : 50 + m]), m
    return x, whole


@pytest.mark.parametrize(
    "m", [0, 1, 31, 33, 100, 129, 257, 512, 513, 600, 1023, 1025, 1500, 3000, 4095, 4096, 5000, 9999]
)
def test_pieces_cover_all_rows_with_certified_sizes(m):
    made = list(quantized.pieces(m, quantized.ROWS))
    assert [at for at, _, _ in made] == [sum(size for _, size, _ in made[:i]) for i in range(len(made))]
    assert sum(size for _, size, _ in made) == m
    assert all(size <= asked and asked in quantized.ROWS for _, size, asked in made)
    assert sum(asked - size for _, size, asked in made) <= max(16, m // 8)  # little work is lost
    assert len(made) <= 3 + m // 2048


def test_pieces_of_few_certified_sizes():
    assert list(quantized.pieces(5, (8, 512))) == [(0, 5, 8)]
    assert list(quantized.pieces(700, (8, 512))) == [(0, 512, 512), (512, 188, 512)]
    assert list(quantized.pieces(20, (8,))) == [(0, 8, 8), (8, 8, 8), (16, 4, 8)]


def test_a_kernel_in_one_order_serves_certified_sizes_only(weight, tmp_path):
    product, seen = quantized.dequantized_product(weight), []

    def vendor(x, bias):
        seen.append(x.shape[0])
        return product(x, bias)

    layer = torch.nn.Module()
    apply = route(layer, vendor, weight, tmp_path)
    seen.clear()
    x, whole = alone_and_among(apply)
    assert set(seen) <= set(quantized.ROWS)
    assert torch.equal(whole, product(x, None))
    assert apply(x[:6].view(2, 3, K), None).shape == (2, 3, N) and apply(x[:0], None).shape == (0, N)
    assert quantized.has_route(layer) and quantized.scheme(layer) == "W4A16 groups of 32"
    assert not quantized.has_route(torch.nn.Module())


def test_sizes_with_another_order_are_filled_up(weight, tmp_path):
    """For one or two rows, the kernel adds two halves of K, in bf16: hidden by rounding on most data."""
    product = quantized.dequantized_product(weight)
    halves = [quantized.dequantized_product(part.float()) for part in weight.split(K // 2, 1)]

    def vendor(x, bias):
        if x.shape[0] > 2:
            return product(x, bias)
        parts = [half(rows.float(), None) for half, rows in zip(halves, x.split(K // 2, 1))]
        return (parts[0] + parts[1]).to(x.dtype)

    apply = route(torch.nn.Module(), vendor, weight, tmp_path)
    (certificate,) = [c for _, c in certificates.every(tmp_path)]
    assert certificate.passed_rows == [m for m in quantized.ROWS if m > 2] and "M=1" in certificate.evidence.first
    x, whole = alone_and_among(apply)
    assert torch.equal(whole, product(x, None))


def test_a_layer_with_a_bias_is_certified_without_its_bias_too(weight, tmp_path):
    """Of tensor-parallel ranks, only the first adds a layer's bias."""
    product, bias = quantized.dequantized_product(weight), torch.ones(N, dtype=torch.bfloat16)

    def vendor(x, given):
        y = product(x, given)
        return torch.nextafter(y, y + 1) if given is None and x.shape[0] < 3 else y

    apply = route(torch.nn.Module(), vendor, weight, tmp_path, bias=bias)
    (certificate,) = [c for _, c in certificates.every(tmp_path)]
    assert certificate.passed_rows == [m for m in quantized.ROWS if m > 2]
    x, whole = alone_and_among(apply)
    assert torch.equal(whole, product(x, None)) and torch.equal(apply(x[:2], bias), product(x, bias)[:2])


def test_a_kernel_whose_rows_share_a_scale_is_not_used(weight, tmp_path, caplog):
    product = quantized.dequantized_product(weight)

    def vendor(x, bias):
        scale = x.float().abs().amax() / 127
        return product(((x.float() / scale).round() * scale).to(x.dtype), bias)

    apply = route(torch.nn.Module(), vendor, weight, tmp_path, scheme="shared scale")
    x, whole = alone_and_among(apply)
    assert torch.equal(whole, product(x, None))
    assert "cpu.quantized shared scale" in caplog.text and "or the bundled GEMM, serves instead" in caplog.text


def test_values_that_are_not_finite_leave_no_certificate(weight, tmp_path):
    apply = route(torch.nn.Module(), lambda x, bias: x.new_full((x.shape[0], N), torch.nan), weight, tmp_path)
    assert not certificates.every(tmp_path)
    assert torch.equal(apply(weight[:3], None), quantized.dequantized_product(weight)(weight[:3], None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [K, 2500])
def test_integer_product_is_exact_and_scaled_by_rows(dtype, k):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-127, 128, (N, k), generator=generator).to(torch.int8)
    scale, bias = torch.rand(N, generator=generator) * 0.01, torch.randn(N, generator=generator)
    x = torch.randn(40, k, generator=generator).to(dtype)
    x[3] = 0
    product = quantized.integer_product(weight, scale)
    step = x.float().abs().amax(-1, keepdim=True) / 127
    q = (x.float() / step.clamp_min(1e-30)).round()
    total = (q.long() @ weight.long().T).float()
    assert torch.equal(product(x, None), (total * step * scale).to(dtype))
    assert torch.equal(product(x, bias), (total * step * scale + bias).to(dtype))
    assert torch.equal(product(x[7:9], None), product(x, None)[7:9])


def test_new_weights_keep_the_route(weight, tmp_path):
    layer, held = torch.nn.Module(), [quantized.dequantized_product(weight)]
    first = route(layer, lambda x, bias: held[0](x, bias), weight, tmp_path)
    held[0] = quantized.dequantized_product(-weight)
    assert route(layer, lambda x, bias: held[0](x, bias), -weight, tmp_path) is first
    assert torch.equal(first(weight[:4], None), held[0](weight[:4], None))


def test_compiled_code_names_a_missing_layer(weight, tmp_path):
    layer = torch.nn.Module()
    apply = route(layer, quantized.dequantized_product(weight), weight, tmp_path)
    eager = apply(weight[:5], None)
    compiled = torch.compile(lambda x: apply(x, None) * 2, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(weight[:5]), eager * 2)
    number = torch.tensor(10**6)
    with pytest.raises(CertificateFailed, match="compile cache"):
        torch.ops.bi_patch.cpu_quantized(weight[:5], None, number, N)
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None
