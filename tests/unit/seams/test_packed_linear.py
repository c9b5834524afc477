"""The seams of packed weights on CUDA: vLLM's checkpoints become packed integers, and what has no kernel is refused."""

import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from bi_patch.errors import CertificateFailed, UnsupportedFeature
from bi_patch.kernels import packing
from bi_patch.kernels.cuda import packed
from bi_patch.ops.cuda import factored_linear, machine
from bi_patch.ops.cuda import packed_linear as ops
from bi_patch.ops.cuda.packed_linear import Problem, Route
from bi_patch.ops.zero_sums import cancelling
from bi_patch.seams.cuda import nvfp4, packed_linear, quantized
from bi_patch.tools.models import quantize

N, K = 64, 256


def parameter(data, **dims):
    """A stand-in of vLLM's parameters, which need a group of ranks: data, and which dimension is which."""
    made = torch.nn.Parameter(data.contiguous(), requires_grad=False)
    for name, dim in dims.items():
        setattr(made, name, dim)
    return made


class Kernel:
    """A stand-in of vLLM's MPLinearKernel."""

    w_q_name, w_s_name, w_zp_name = "qweight", "scales", "qzeros"

    def __init__(self, n, k, bits=4, zeros=False, group=128, dtype=torch.bfloat16):
        kind = SimpleNamespace(size_bits=bits)
        self.config = SimpleNamespace(
            partition_weight_shape=(k, n), weight_type=kind, zero_points=zeros, group_size=group, act_type=dtype
        )

    def _get_weight_params(self, layer):
        return layer.qweight, layer.scales, getattr(layer, "qzeros", None)


def dequantized(q, scale, zero):
    size = q.shape[1] // scale.shape[1]
    middle = 8 if zero is None else zero.double().repeat_interleave(size, 1)
    return (q.double() - middle) * scale.double().repeat_interleave(size, 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_forms_of_other_bits_are_no_candidates(monkeypatch, bits):
    monkeypatch.setattr(machine, "shared_memory", lambda: 227 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    numbers = ops.runnable(Problem(N, K, torch.bfloat16, False, bits, 128, False))
    assert {packed.FORMS[number].bits for number in numbers} == {bits}


def test_the_integers_of_awq_gptq_and_compressed_tensors():
    from vllm.model_executor.layers.quantization.auto_awq import _REVERSE_AWQ_PACK_ORDER

    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(2))
    q, scale, zero = quantize._four_bits(weight, 128, True)
    # AWQ, as vLLM's own conversion leaves it: integers [K / 8, N], zero points [N / 8, K / group].
    layer = torch.nn.Module()
    layer.qweight = parameter(quantize._packed(q).T, input_dim=0, output_dim=1, packed_dim=0)
    layer.scales = parameter(scale.T, input_dim=0, output_dim=1)
    zeros = quantize._packed(zero.T.contiguous()).T
    layer.qzeros = parameter(zeros, input_dim=1, output_dim=0, packed_dim=0)
    got = packed_linear._integers(Kernel(N, K, zeros=True), layer, N, K, 4)
    assert torch.equal(dequantized(*got), dequantized(q, scale, zero)) and len(_REVERSE_AWQ_PACK_ORDER) == 8
    # compressed-tensors: integers [N, K / 8].
    q, scale, _ = quantize._four_bits(weight, 128, False)
    layer.qweight = parameter(quantize._packed(q), input_dim=1, output_dim=0, packed_dim=1)
    layer.scales = parameter(scale, input_dim=1, output_dim=0)
    q_got, scale_got, none = packed_linear._integers(Kernel(N, K), layer, N, K, 4)
    assert torch.equal(q_got, q.to(torch.uint8)) and torch.equal(scale_got, scale) and none is None


@pytest.mark.parametrize(
    "given", [{"n": 40}, {"k": 192}, {"group": 16}, {"bits": 3}, {"dtype": torch.int8}, {"dtype": torch.float8_e4m3fn}]
)
def test_a_layer_without_a_kernel_is_refused_by_name(given):
    kernel = Kernel(**({"n": N, "k": K} | given))
    k, n = kernel.config.partition_weight_shape
    with pytest.raises(UnsupportedFeature, match=f"linear.cuda_packed: a QKVParallelLinear of {n} x {k}"):
        packed_linear._check("QKVParallelLinear", kernel, n, k)
    packed_linear._check("QKVParallelLinear", Kernel(N, K, group=-1), N, K)


class _Layer(torch.nn.Module):
    pass


def test_a_layer_has_a_problem_with_its_dequantized_weights(monkeypatch):
    kernel = Kernel(N, K, zeros=True)
    layer = _Layer()
    layer.qweight = torch.zeros(N * K // 2, dtype=torch.uint8)
    layer.scales = layer.qzeros = torch.zeros(2, N, dtype=torch.bfloat16)
    layer.bias, layer.tp_size = torch.zeros(N), 2
    monkeypatch.setattr(quantized, "layers", lambda model, kinds: [("qkv", layer, kernel)])
    with pytest.raises(UnsupportedFeature, match="qkv was loaded before"):
        list(packed_linear.problems(None))
    kernel.bi_patch_group = 128
    whole, alone = (Problem(N, K, torch.bfloat16, bias, 4, 128, True) for bias in (True, False))
    assert list(packed_linear.problems(None)) == [whole.dequantized(), whole, alone.dequantized(), alone]
    assert "N=64 K=256 int4 groups of 128 zero points bfloat16 bias" == str(whole)


def test_a_variant_serves_up_to_its_timed_rows_only_if_it_is_certified():
    route = Route(frozenset({0, 3}), {8: 0, 64: 3, 128: 5, 256: -1})
    assert [route.variant(m) for m in (1, 8, 9, 64, 65, 200, 257)] == [0, 0, 3, 3, None, None, None]


class CutlassInt8ScaledMMLinearKernel:
    """A stand-in of vLLM's kernel for INT8."""

    config = SimpleNamespace(is_static_input_scheme=False)

    def _get_layer_params(self, layer):
        return layer.weight, None, None, None, None

    def apply_weights(self, layer, x, bias):
        return x @ layer.weight if bias is None else x @ layer.weight + bias


def test_an_int8_layer_is_certified_as_it_is(monkeypatch):
    from bi_patch.seams.cuda import rows

    layer = _Layer()
    layer.weight, layer.bias = torch.ones(64, 32), torch.ones(32)
    monkeypatch.setattr(quantized, "layers", lambda *_: [("qkv", layer, CutlassInt8ScaledMMLinearKernel())])
    (check,) = rows._int8(None, torch.bfloat16)
    assert (check.operation, check.problem) == ("cuda.int8_linear", "int8 by row K=64 N=32 bias bfloat16")
    (out,) = check.run(torch.ones(3, 64))
    assert out.shape == (3, 32) and (out == 65).all()
    layer.skip_bias_add = True
    (check,) = rows._int8(None, torch.bfloat16)
    assert check.problem == "int8 by row K=64 N=32 bfloat16" and (check.run(torch.ones(1, 64))[0] == 64).all()


class HummingNvFp4LinearKernel:
    """A stand-in of vLLM's kernel for NVFP4 weights."""

    supported = True, None

    def __init__(self, config=None):
        self.config = config

    @classmethod
    def is_supported(cls):
        return cls.supported

    def apply_weights(self, layer, x, bias):
        return x @ layer.held if bias is None else x @ layer.held + bias


def test_nvfp4_weights_alone_take_the_kernel_that_is_certified(monkeypatch):
    monkeypatch.setattr(ops, "serves_floats", lambda: False)
    kernels = SimpleNamespace(
        HummingNvFp4LinearKernel=HummingNvFp4LinearKernel,
        NvFp4LinearLayerConfig=lambda: "config",
        _get_linear_backend=lambda quantization: "auto",
    )
    monkeypatch.setitem(sys.modules, "vllm.model_executor.kernels", SimpleNamespace(linear=kernels))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.kernels.linear", kernels)

    def init_nvfp4_linear_kernel(use_a16=False):
        raise AssertionError("vLLM's choice")

    choose = packed_linear._nvfp4(init_nvfp4_linear_kernel)
    assert choose(use_a16=True).config == "config" and quantized.KERNELS[quantized.NVFP4] == "rows"
    with pytest.raises(UnsupportedFeature, match="linear.cuda_nvfp4: .*round activations"):
        choose()
    monkeypatch.setattr(HummingNvFp4LinearKernel, "supported", (False, "Humming is not installed"))
    with pytest.raises(UnsupportedFeature, match="linear.cuda_nvfp4: .*Humming is not installed"):
        choose(use_a16=True)


@pytest.fixture
def bf16():
    held = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(held)


def test_nvfp4_weights_in_bf16_on_hopper_take_the_bundled_kernel(monkeypatch, bf16):
    def init_nvfp4_linear_kernel(use_a16=False):
        raise AssertionError("vLLM's choice")

    choose = packed_linear._nvfp4(init_nvfp4_linear_kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    kernel = choose(use_a16=True)
    assert type(kernel).__name__ == quantized.PACKED_NVFP4 and kernel.input_quant_key() is None
    assert quantized.KERNELS[quantized.PACKED_NVFP4] == "packed_linear"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert not nvfp4.served()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert nvfp4.served()
    torch.set_default_dtype(torch.float16)
    assert not nvfp4.served()


def nvfp4_layer(n, k):
    """A layer as vLLM's schemes hand it to a kernel, and its codes [N, K]."""
    generator = torch.Generator().manual_seed(n)
    q = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    layer = _Layer()
    scale = (torch.rand((n, k // 16), generator=generator) * 32).to(torch.float8_e4m3fn)
    held = {"weight": q[:, 0::2] | q[:, 1::2] << 4, "weight_scale": scale, "weight_global_scale": torch.tensor(0.03)}
    for name, value in held.items():
        layer.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    return layer, q, scale


def test_the_floats_of_nvfp4_are_packed_once(monkeypatch):
    from vllm.model_executor.kernels.linear import NvFp4LinearLayerConfig

    layer, q, scale = nvfp4_layer(N, K)
    kernel = nvfp4.own()(NvFp4LinearLayerConfig())
    kernel.process_weights_after_loading(layer)
    want = packing.pack_floats(q, scale, torch.tensor(0.03))
    assert torch.equal(layer.weight, want.data) and torch.equal(layer.weight_scale, want.scale)
    assert layer.weight_global_scale == want.whole == torch.tensor(0.03) * 128
    layer.bias, layer.tp_size = torch.zeros(N), 2
    monkeypatch.setattr(quantized, "layers", lambda model, kinds: [("qkv", layer, kernel)])
    made = [Problem(N, K, torch.bfloat16, bias, 4, 16, False, True) for bias in (True, False)]
    assert made[0].dequantized() is None  # a bundled kernel adds the bias to the rounded product
    assert list(packed_linear.problems(None)) == [made[0], made[1].dequantized(), made[1]]
    assert made[1].dequantized() == factored_linear.Problem(N, K, torch.bfloat16)
    assert str(made[0]) == "N=64 K=256 e2m1 groups of 16 bfloat16 bias"
    with pytest.raises(CertificateFailed, match="cuda.packed_linear: N=64 K=256 e2m1 .* has no certificate"):
        held = layer.weight, layer.weight_scale, None, None, 4, 16, layer.weight_global_scale
        ops.packed_linear(torch.zeros(1, K, dtype=torch.bfloat16), *held)
    with pytest.raises(CertificateFailed, match="no invariant GEMM for torch.bfloat16 rows and scales of torch.uint8"):
        ops.packed_linear(torch.zeros(1, K, dtype=torch.bfloat16), *held[:-1])
    for n, k in ((40, 256), (64, 192)):
        with pytest.raises(UnsupportedFeature, match=f"linear.cuda_packed: a _Layer of {n} x {k} with NVFP4 weights"):
            kernel.process_weights_after_loading(nvfp4_layer(n, k)[0])


def test_floats_have_no_way_but_the_bundled_kernels():
    route = Route(frozenset({0, 3}), {8: 0, 64: 3}, False)
    assert [route.variant(m) for m in (1, 8, 9, 64, 65, 5000)] == [0, 0, 3, 3, 3, 3]
    assert Route(frozenset(), {}, False).variant(1) is None


def test_half_of_the_compared_sums_of_floats_are_zero(monkeypatch):
    given, make = [], packing.pack_floats
    monkeypatch.setattr(packing, "pack_floats", lambda *held: given.append(held) or make(*held))
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(K, generator=generator)
    packed, bias = ops.drawn(Problem(N, K, torch.bfloat16, True, 4, 16, False, True), order, generator)
    (codes, scale, _), x = given[0], cancelling(7, order, 1, generator, torch.bfloat16)
    value = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes.long() & 7] * torch.where(codes > 7, -1, 1)
    sums = x.double() @ (value.double() * scale.double().repeat_interleave(16, 1)).T
    assert (sums[:, ::2] == 0).all() and (sums[:, 1::2] != 0).all() and (bias[::2] == 0).all()
    assert packed.whole == ops._POWER * 128 and len(codes.unique()) > 12


def test_an_nvfp4_layer_is_certified_as_it_is(monkeypatch):
    from bi_patch.seams.cuda import rows

    layer = _Layer()
    layer.held, layer.bias = torch.ones(64, 32), torch.ones(32)
    layer.input_size_per_partition, layer.output_size_per_partition = 64, 32
    monkeypatch.setattr(quantized, "layers", lambda *_: [("qkv", layer, HummingNvFp4LinearKernel())])
    monkeypatch.setitem(sys.modules, "humming", SimpleNamespace(__version__="0.1.19"))
    monkeypatch.setenv("HUMMING_COMPILER", "nvcc")
    (check,) = rows._nvfp4(None, torch.bfloat16)
    assert check.library == "humming-kernels 0.1.19 HUMMING_COMPILER=nvcc"
    assert (check.operation, check.problem) == ("cuda.nvfp4_linear", "nvfp4 K=64 N=32 bias bfloat16")
    assert (check.run(torch.ones(3, 64))[0] == 65).all() and check.rows[-1] > 1024
    layer.skip_bias_add = True
    (check,) = rows._nvfp4(None, torch.bfloat16)
    assert check.problem == "nvfp4 K=64 N=32 bfloat16" and (check.run(torch.ones(1, 64))[0] == 64).all()


def test_random_nvfp4_weights_have_the_spread_of_others():
    from bi_patch.tools.verify import weights

    layer, model = torch.nn.Module(), torch.nn.Module()
    model.add_module("qkv", layer)
    held = {
        "weight_packed": torch.zeros((N, K // 2), dtype=torch.uint8),
        "weight_scale": torch.zeros((N, K // 16)).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.zeros(2),
    }
    for name, value in held.items():
        layer.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    weights.fill(model, 7)
    code = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = (layer.weight_packed[..., None].int() >> torch.tensor([0, 4]) & 15).flatten(1)
    value = code[nibbles & 7] * torch.where(nibbles > 7, -1, 1)
    spread = (value * layer.weight_scale.float().repeat_interleave(16, 1) / layer.weight_global_scale[0]).std()
    assert 0.8 < spread * K**0.5 < 1.3


def test_hummings_kernel_comes_last_unless_it_was_asked_for():
    from vllm.model_executor.kernels import linear

    names = ["MacheteLinearKernel", "HummingLinearKernel", "MarlinLinearKernel"]
    kinds = {name: type(name, (), {}) for name in names}

    def resolve(kernels, layer_desc, *, quantization, compute_capability=None):
        return [kinds[name] for name in kernels]

    ordered = packed_linear._ordered(resolve)
    given = dict(quantization="mixed_precision", compute_capability=90)
    assert [kind.__name__ for kind in ordered(names, "mixed-precision", **given)] == [names[0], names[2], names[1]]
    assert ordered(names[1:2], "mixed-precision", **given) == [kinds[names[1]]]
    assert linear.HummingLinearKernel.__name__ == packed_linear._LAST
