"""Checkpoints that ask for activations in NVFP4: on Hopper activations stay in bf16, and weights have vLLM's values."""

import pytest
import torch

pytest.importorskip("vllm")

from bi_patch.errors import UnsupportedFeature
from bi_patch.kernels import packing
from bi_patch.seams.cuda import nvfp4, packed_linear, quantized

N, K = 64, 256
MOST = 6 * 448  # the greatest e2m1 times the greatest e4m3


@pytest.fixture
def bf16():
    held = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(held)


@pytest.fixture
def choose(monkeypatch, bf16):
    """vLLM's choice of a kernel, as bi_patch makes it on Hopper."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def init_nvfp4_linear_kernel(use_a16=False):
        raise AssertionError("vLLM's choice")

    return packed_linear._nvfp4(init_nvfp4_linear_kernel)


def test_on_hopper_activations_stay_in_bf16(choose):
    kernel = choose()
    assert type(kernel).__name__ == quantized.PACKED_NVFP4
    assert kernel.input_quant_key() is None  # vLLM fuses no rounding into the layer before


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_on_other_gpus_they_are_refused_by_name(monkeypatch, choose, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(UnsupportedFeature, match="linear.cuda_nvfp4: .*may round activations to NVFP4"):
        choose()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_in_other_types_they_are_refused_by_name(choose, dtype):
    torch.set_default_dtype(dtype)
    with pytest.raises(UnsupportedFeature, match="linear.cuda_nvfp4: .*may round activations to NVFP4"):
        choose()


def test_a_backend_that_rounds_activations_is_refused_by_name(monkeypatch, choose):
    from vllm.model_executor.kernels import linear

    asked = {}
    monkeypatch.setattr(linear, "_get_linear_backend", lambda quantization: asked[quantization])
    for backend in linear._LINEAR_BACKEND_KERNEL_MAP:
        asked |= {"nvfp4_w4a4": backend, "nvfp4_w4a16": "auto"}
        if backend in ("humming", "marlin"):
            assert type(choose()).__name__ == quantized.PACKED_NVFP4
            continue
        with pytest.raises(UnsupportedFeature, match=f"linear.cuda_nvfp4: .*--linear-backend {backend}"):
            choose()
        assert type(choose(use_a16=True)).__name__ == quantized.PACKED_NVFP4


def compressed_tensors():
    """A scheme of vLLM without its kernel, and what multiplies in its checkpoints: scales divide there."""
    from vllm.model_executor.layers.quantization.compressed_tensors import schemes

    made = object.__new__(schemes.CompressedTensorsW4A4Fp4)
    made.use_a16 = False
    return made, ("weight_packed", "weight_global_scale", "input_global_scale"), -1


def modelopt():
    from types import SimpleNamespace

    from vllm.model_executor.layers.quantization import modelopt

    spec, context, form = modelopt.resolve("NVFP4", SimpleNamespace(group_size=16), "")
    return modelopt.ModelOptLinearMethod(spec, context, form), ("weight", "weight_scale_2", "input_scale"), 1


def quark():
    from vllm.model_executor.layers.quantization.quark.schemes import QuarkNVFP4

    return object.__new__(QuarkNVFP4), ("weight", "weight_scale_2", "input_scale_2"), 1


def loaded(method, kernel, power: float):
    """A layer of two parts that a method's process_weights_after_loading left to a kernel. power: 1 for any scale of
    all, 0 for powers of two."""
    made, (weight, whole, of_rows), sign = method()
    made.kernel = kernel
    generator = torch.Generator().manual_seed(3)
    layer = torch.nn.Module()
    scale = torch.randn((N, K // 16), generator=generator).mul(32).clamp(-448, 448)
    scale[0, :2] = torch.tensor([0.0, 2.0**-9])
    of_parts = torch.tensor([2.0**-8, 2.0**-9]) * torch.tensor([1.37, 1.59]) ** power
    for name, value in (
        (weight, torch.randint(0, 256, (N, K // 2), generator=generator, dtype=torch.uint8)),
        ("weight_scale", scale.to(torch.float8_e4m3fn)),
        (whole, of_parts**sign),
        (of_rows, torch.tensor([8.0, 5.0]).div(MOST) ** sign),
    ):
        layer.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    made.process_weights_after_loading(layer)
    return layer


def value_of(q):
    return torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[q.long() & 7] * torch.where(q > 7, -1, 1)


@pytest.mark.parametrize("method", [compressed_tensors, modelopt, quark])
def test_a_weight_is_what_vllm_dequantizes(monkeypatch, method):
    from vllm.model_executor.kernels.linear import EmulationNvFp4LinearKernel, NvFp4LinearLayerConfig
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

    given, make = [], packing.pack_floats
    monkeypatch.setattr(packing, "pack_floats", lambda *held: given.append(held) or make(*held))
    for power in (1, 0):
        other = loaded(method, EmulationNvFp4LinearKernel(NvFp4LinearLayerConfig()), power)
        held = other.weight.data, other.weight_scale.data, other.weight_global_scale.data
        want = dequantize_to_dtype(*held, torch.float32, 16, swizzle=False).double()
        kernel = nvfp4.own.__wrapped__()(NvFp4LinearLayerConfig())  # made anew, with this test's function
        layer = loaded(method, kernel, power)
        q, scale, whole = given[-1]
        got = value_of(q).double() * scale.double().repeat_interleave(16, 1) * whole.double()
        # vLLM rounds each weight to fp32, bi_patch no weight: with powers of two, vLLM's rounding changes none.
        assert torch.allclose(got, want, rtol=2**-22, atol=0) and (power or torch.equal(got, want))
        packed = make(q, scale, whole)
        assert torch.equal(layer.weight, packed.data) and torch.equal(layer.weight_scale, packed.scale)
        assert layer.weight_global_scale == packed.whole
        # Of two parts with different scales, vLLM takes one, and so does bi_patch.
        one = 2**-9 * 1.59**power if method is compressed_tensors else 2**-8 * 1.37**power
        assert whole == other.weight_global_scale == pytest.approx(one)
        assert layer.input_global_scale == other.input_global_scale  # loaded, and not used


def test_a_scale_without_a_byte_is_refused_with_the_name_of_the_layer():
    from vllm.model_executor.kernels.linear import NvFp4LinearLayerConfig

    layer = torch.nn.Module()
    layer.prefix = "model.layers.0.mlp.down_proj"
    scale = torch.ones(N, K // 16).to(torch.float8_e4m3fn)
    scale.view(torch.uint8)[1, 2] = 0x7F  # a NaN
    for name, value in (
        ("weight", torch.zeros(N, K // 2, dtype=torch.uint8)),
        ("weight_scale", scale),
        ("weight_global_scale", torch.ones(())),
    ):
        layer.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    words = "linear.cuda_packed: .* the NVFP4 weights of model.layers.0.mlp.down_proj: .* not finite, or out of range"
    with pytest.raises(UnsupportedFeature, match=words):
        nvfp4.own()(NvFp4LinearLayerConfig()).process_weights_after_loading(layer)


def test_rows_are_multiplied_as_they_are(bf16):
    from vllm.model_executor.kernels.linear import NvFp4LinearLayerConfig

    kernel, given = nvfp4.own()(NvFp4LinearLayerConfig()), []
    layer = loaded(modelopt, kernel, 1)
    product = torch.library.Library("bi_patch", "IMPL", "CPU")
    product.impl("packed_linear", lambda x, *held: given.append((x, *held)) or x.new_zeros((*x.shape[:-1], N)))
    x = torch.randn(3, 2, K)
    bias = torch.randn(N)
    assert kernel.apply_weights(layer, x, bias).shape == (3, 2, N)
    ((rows, data, scale, zero, added, bits, group, whole),) = given
    assert torch.equal(rows, x) and torch.equal(data, layer.weight) and torch.equal(scale, layer.weight_scale)
    assert zero is None and torch.equal(added, bias) and (bits, group) == (4, 16)
    assert torch.equal(whole, layer.weight_global_scale)
    product._destroy()
