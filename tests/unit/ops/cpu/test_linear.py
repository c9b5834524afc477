"""Routes of linears on CPU with the real bundled kernels."""

import gc
import weakref

import pytest
import torch
from torch.nn import Linear as TorchLinear
from torch.nn import functional as F

from bi_patch.errors import CertificateFailed
from bi_patch.ops import bits, certificates
from bi_patch.ops.cpu import linear, machine

N, K = 192, 128


@pytest.fixture(autouse=True)
def kernels(cache):
    machine.load_kernels(cache)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def layer(request):
    torch.manual_seed(0)
    return TorchLinear(K, N, bias=True, dtype=request.param, device="cpu").requires_grad_(False)


def bundled(layer):
    packed = torch.ops.bi_cpu.gemm_pack(layer.weight)
    return lambda x, weight, bias: torch.ops.bi_cpu.gemm(x, packed, N, K, bias)


def split_k(x, weight, bias):
    """A GEMM that splits K in two for fewer than nine rows, as libraries do: a planted fault of cause 1."""
    if x.shape[0] > 8:
        return F.linear(x.float(), weight.float(), bias.float()).to(x.dtype)
    halves = [x[:, a:b].float() @ weight[:, a:b].float().t() for a, b in ((0, K // 2), (K // 2, K))]
    return (halves[1].to(x.dtype).float() + halves[0] + bias.float()).to(x.dtype)


def route(layer, vendor, folder, library="test 1"):
    return linear.route(layer.weight, layer.bias, vendor, layer, folder, library)


def alone_and_among(apply, layer):
    x = torch.randn(777, K).to(layer.weight.dtype)
    whole = apply(x, layer.weight, layer.bias)
    for m in (1, 2, 7, 16, 17, 64, 65, 130, 512, 600):
        assert torch.equal(apply(x[100 : 100 + m], layer.weight, layer.bias), whole[100 : 100 + m]), m
    return x, whole


def test_a_library_that_splits_k_is_not_used(layer, tmp_path):
    apply = route(layer, split_k, tmp_path)
    x, whole = alone_and_among(apply, layer)
    assert torch.equal(whole, bundled(layer)(x, layer.weight, layer.bias))
    (certificate,) = [c for _, c in certificates.every(tmp_path)]
    assert not certificate.passed and certificate.evidence.differing > 0 and "M=1" in certificate.evidence.first


def test_an_order_that_rounding_hides_is_seen(tmp_path):
    """For one row, the GEMM adds two halves of K in fp32. In bf16, plain random data shows this in one of thousands of
    outputs."""
    n, k = 576, 1536
    layer = TorchLinear(k, n, bias=False, dtype=torch.bfloat16, device="cpu").requires_grad_(False)
    pack, gemm = torch.ops.bi_cpu.gemm_pack, torch.ops.bi_cpu.gemm
    whole = pack(layer.weight)
    halves = [(slice(a, a + k // 2), pack(layer.weight[:, a : a + k // 2].float())) for a in (0, k // 2)]

    def vendor(x, weight, bias):
        if x.shape[0] > 1:
            return gemm(x, whole, n, k, None)
        parts = [gemm(x[:, span].float(), packed, n, k // 2, None) for span, packed in halves]
        return (parts[0] + parts[1]).to(x.dtype)

    linear.route(layer.weight, None, vendor, layer, tmp_path, "test 1")
    (certificate,) = [c for _, c in certificates.every(tmp_path)]
    assert certificate.passed_rows == [m for m in linear.ROWS if m != 1]
    assert certificate.evidence.differing > 30


def test_a_library_in_the_same_order_may_be_used(layer, tmp_path, monkeypatch):
    calls = []
    ours = bundled(layer)

    def vendor(x, weight, bias):
        calls.append(x.shape[0])
        return ours(x, weight, bias)

    monkeypatch.setattr(linear, "_time", lambda call: 1.0 if "vendor" in call.__code__.co_freevars else 2.0)
    apply = route(layer, vendor, tmp_path)
    (certificate,) = [c for _, c in certificates.every(tmp_path)]
    assert certificate.passed and certificate.evidence.differing == 0
    calls.clear()
    alone_and_among(apply, layer)
    assert set(calls) <= set(linear.ROWS)


@pytest.mark.parametrize("served", [frozenset(), frozenset({4})], ids=["bundled", "library for 4 rows"])
def test_a_bias_that_upstream_widened(layer, tmp_path, monkeypatch, served):
    """Upstream widens the bias of small layers for its own kernel. The bundled GEMM takes the bias as loaded."""
    monkeypatch.setattr(linear, "serving", lambda certificate: served)
    loaded, ours = layer.bias.detach().clone(), bundled(layer)
    layer.bias.data = layer.bias.float()

    def vendor(x, weight, bias):
        assert bias is None or bias.dtype == torch.float32
        return ours(x, weight, None if bias is None else bias.to(x.dtype))

    apply = linear.route(layer.weight, loaded, vendor, layer, tmp_path, "test 1")
    x = torch.randn(6, K).to(layer.weight.dtype)
    for m in (1, 4, 6):
        assert torch.equal(apply(x[:m], layer.weight, layer.bias), ours(x[:m], layer.weight, loaded))


def test_shapes_and_bias(layer, tmp_path):
    apply = route(layer, split_k, tmp_path)
    x = torch.randn(2, 3, K).to(layer.weight.dtype)
    assert apply(x, layer.weight, layer.bias).shape == (2, 3, N)
    assert apply(x[:0], layer.weight, layer.bias).shape == (0, 3, N)
    assert torch.equal(apply(x, layer.weight, None), apply(x, layer.weight, layer.bias * 0))


def test_a_library_certified_with_a_bias_does_not_serve_without_one(layer, tmp_path, monkeypatch):
    """Of tensor-parallel ranks, only the first adds a layer's bias."""
    monkeypatch.setattr(linear, "serving", lambda certificate: frozenset(certificate.passed_rows))
    ours = bundled(layer)

    def vendor(x, weight, bias):
        return split_k(x, weight, torch.zeros(N)) if bias is None else ours(x, weight, bias)

    apply = route(layer, vendor, tmp_path)
    x = torch.randn(40, K).to(layer.weight.dtype)
    for m in (1, 4, 40):
        assert torch.equal(apply(x[:m], layer.weight, None), ours(x, layer.weight, None)[:m])


def test_a_stale_certificate_is_made_again(layer, tmp_path):
    route(layer, split_k, tmp_path)
    route(layer, split_k, tmp_path)
    assert len(certificates.every(tmp_path)) == 1
    route(layer, split_k, tmp_path, "test 2")
    assert len(certificates.every(tmp_path)) == 2


def test_routes_compile_whole(layer, tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "serving", lambda certificate: frozenset({1, 64}))
    apply = route(layer, bundled(layer), tmp_path)
    doubled = lambda x: apply(x, layer.weight, layer.bias) * 2  # noqa: E731
    compiled = torch.compile(doubled, fullgraph=True, dynamic=True, backend="eager")
    for m in (1, 5, 64, 70):
        x = torch.randn(m, K).to(layer.weight.dtype)
        assert torch.equal(compiled(x), bundled(layer)(x, layer.weight, layer.bias) * 2)


def test_a_library_that_cannot_be_compared_is_not_used_and_the_next_start_tries_again(layer, tmp_path):
    def broken(x, weight, bias):
        raise RuntimeError("no primitive")

    apply = route(layer, broken, tmp_path)
    x, whole = alone_and_among(apply, layer)
    assert torch.equal(whole, bundled(layer)(x, layer.weight, layer.bias))
    assert certificates.every(tmp_path) == []


def test_weights_that_are_not_finite_get_the_bundled_kernel(layer, tmp_path):
    layer.weight[3, 5] = float("inf")
    apply = route(layer, bundled(layer), tmp_path)
    x = torch.randn(4, K).to(layer.weight.dtype)
    assert not bits.differing(apply(x, layer.weight, layer.bias), bundled(layer)(x, layer.weight, layer.bias))


@pytest.mark.parametrize("serves", ["library", "bundled"])
def test_new_weights_keep_the_route_and_free_the_old_ones(layer, tmp_path, monkeypatch, serves):
    """Compiled code takes the handle of the first load. With new weights, the same handle serves them."""
    monkeypatch.setattr(linear, "serving", lambda c: frozenset(linear.ROWS if serves == "library" else ()))
    first = route(layer, bundled(layer), tmp_path)
    handle, packed, count = layer.bi_patch_handle, linear._layers[layer.bi_patch_handle].packed, len(linear._layers)
    old = weakref.ref(linear._layers[handle].vendor) if serves == "library" else lambda: None
    layer.weight.mul_(-1.5)
    again = route(layer, bundled(layer), tmp_path)
    assert again is first and layer.bi_patch_handle == handle and linear._layers[handle].packed is packed
    assert len(linear._layers) == count and old() is None
    x = torch.randn(16, K).to(layer.weight.dtype)
    want = bundled(layer)(x, layer.weight, layer.bias)
    assert torch.equal(again(x, layer.weight, layer.bias), want)
    if serves == "library":
        assert torch.equal(torch.ops.bi_patch.cpu_linear(x, layer.bias, torch.tensor(handle), N), want)
    assert torch.equal(linear.unpacked(layer), layer.weight)
    assert linear.has_route(layer) and layer in linear.take_routed() and not linear.take_routed()
    del layer.bi_patch_handle
    assert not linear.has_route(layer)


def test_a_route_ends_with_its_layer(tmp_path):
    torch.manual_seed(0)
    layer = TorchLinear(K, N, bias=True, dtype=torch.bfloat16, device="cpu").requires_grad_(False)
    route(layer, bundled(layer), tmp_path)
    handle = layer.bi_patch_handle
    assert handle in linear._layers
    linear.take_routed()
    del layer
    gc.collect()
    assert handle not in linear._layers


class Model(torch.nn.Module):
    """A layer with a route, as vLLM's linears call their routes."""

    def __init__(self, seed, folder):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = TorchLinear(K, N, bias=True, dtype=torch.bfloat16, device="cpu").requires_grad_(False)
        self.layer.cpu_linear = route(self.layer, bundled(self.layer), folder)

    def forward(self, x):
        return self.layer.cpu_linear(x, self.layer.weight, self.layer.bias)


@pytest.mark.parametrize("serves", ["library", "bundled"])
def test_compiled_code_computes_with_the_layers_of_the_model_that_it_gets(tmp_path, monkeypatch, serves):
    """vLLM drops the guards of compiled code, and keeps the code for every engine with the same configuration."""

    def made(seed, library):
        monkeypatch.setattr(linear, "serving", lambda certificate: frozenset(linear.ROWS if library else ()))
        return Model(seed, tmp_path)

    first, second, other = (made(1, serves == "library"), made(2, serves == "library"), made(3, serves != "library"))
    x = torch.randn(16, K).bfloat16()
    torch._dynamo.reset()
    options = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    compiled = torch.compile(Model.forward, fullgraph=True, backend="aot_eager", options=options)
    for model in (first, second, other, first):
        assert torch.equal(compiled(model, x), bundled(model.layer)(x, model.layer.weight, model.layer.bias))


def test_code_of_another_model_is_an_error_by_name(layer, tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "serving", lambda c: frozenset(linear.ROWS))
    route(layer, bundled(layer), tmp_path)
    x, number = torch.randn(2, K).to(layer.weight.dtype), torch.tensor(layer.bi_patch_handle)
    for given in (torch.tensor(10**9), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(CertificateFailed, match="N=192 K=128 that its model does not have"):
            torch.ops.bi_patch.cpu_linear(x, layer.bias, given, N)
    with pytest.raises(CertificateFailed, match="N=64"):
        torch.ops.bi_patch.cpu_linear(x, layer.bias, number, 64)
