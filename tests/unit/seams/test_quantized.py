"""Quantized layers on CPU: a layer without a route is refused, and loaded integers give the weight of the format."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.cpu import quantized


class AutoAWQMarlinLinearMethod:
    pass


class UnquantizedLinearMethod:
    pass


class Attention(torch.nn.Module):
    pass


def model(**layers):
    made = torch.nn.Module()
    for name, (layer, method) in layers.items():
        layer.quant_method = method
        made.add_module(name, layer)
    return made


def test_a_quantized_layer_without_a_route_is_refused_by_name():
    plain = {"plain": (torch.nn.Linear(2, 2), UnquantizedLinearMethod()), "none": (torch.nn.Linear(2, 2), None)}
    quantized.check(model(**plain, attn=(Attention(), AutoAWQMarlinLinearMethod())))
    with pytest.raises(UnsupportedFeature, match="engine.cpu_load: .* down .Linear, AutoAWQMarlinLinearMethod"):
        quantized.check(model(**plain, down=(torch.nn.Linear(2, 2), AutoAWQMarlinLinearMethod())))


@pytest.mark.parametrize(
    ("scheme", "served"),
    [
        ("W4A8 groups of 32", True),
        ("W4A16 groups of 128 zeros", True),
        ("W8A8 onednn token", True),
        ("W8A8 onednn static", False),
        ("W8A8 sgl token", False),
        ("FP8 blocks of 128x128", False),
        ("", True),
    ],
)
def test_new_weights_without_evidence_are_refused_by_name(monkeypatch, scheme, served):
    from bi_patch.ops.cpu import quantized as routes

    monkeypatch.setattr(routes, "has_route", lambda layer: bool(scheme))
    monkeypatch.setattr(routes, "scheme", lambda layer: scheme)
    if served:
        return quantized._first(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedFeature, match=f"quantized.cpu_update: .*Linear .{scheme}"):
        quantized._first(torch.nn.Linear(2, 2))


class Packed(torch.nn.Module):
    """The tensors of a GPTQ layer, of 32 integers, 4 scales, 4 biases and 2 zero points."""

    def __init__(self, bias=True):
        super().__init__()
        for name, size in {"qweight": 32, "scales": 4, "qzeros": 2}.items():
            self.register_buffer(name, torch.zeros(size))
        self.bias = torch.nn.Parameter(torch.zeros(4)) if bias else None


@pytest.mark.parametrize(
    ("given", "bias", "zeros", "whole"),
    [
        ({"qweight": 32, "scales": 4}, False, False, True),
        ({"qweight": 32, "scales": 4, "bias": 4}, True, False, True),
        ({"qweight": 32, "scales": 4}, True, False, False),
        ({"qweight": 32}, False, False, False),
        ({"qweight": 16, "scales": 4}, False, False, False),
        ({"qweight": 32, "scales": 4, "qzeros": 2}, False, False, True),
        ({"qweight": 32, "scales": 2, "qzeros": 2}, False, False, False),
        ({"qweight": 32, "scales": 4}, False, True, False),
        ({}, False, False, False),
    ],
)
def test_a_load_may_leave_out_what_the_kernel_does_not_read(given, bias, zeros, whole):
    """zeros: whether the kernel reads zero points."""

    class Kernel:
        w_q_name, w_s_name, w_zp_name = "qweight", "scales", "qzeros"
        config = SimpleNamespace(zero_points=zeros, partition_weight_shape=(8, 4), act_type=torch.bfloat16)

    def load(self, layer):
        raise InterruptedError  # before a route is made

    layer, info = (
        Packed(bias),
        SimpleNamespace(loaded_weights=[(n, None) for n in given], load_numel=sum(given.values())),
    )
    assert not quantized.complete(layer, info)  # of a scheme that names no tensors
    for name in ("qweight", "scales", "qzeros"):
        getattr(layer, name).output_dim = 1
    with pytest.raises(InterruptedError):
        quantized._int4(load)(Kernel(), layer)
    assert quantized.complete(layer, info) is whole


@pytest.mark.parametrize("outputs_first", [False, True], ids=["GPTQ", "compressed-tensors"])
@pytest.mark.parametrize("zeros", [False, True])
def test_loaded_integers_give_the_weight(outputs_first, zeros):
    from vllm.model_executor.layers.quantization.utils.quant_utils import pack_quantized_values_into_int32 as pack
    from vllm.scalar_type import scalar_types

    kind = scalar_types.uint4 if zeros else scalar_types.uint4b8
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (32, 64), generator=generator, dtype=torch.int32)  # [N, K]
    zero = torch.randint(0, 16, (32, 2), generator=generator, dtype=torch.int32)
    scale = torch.rand(32, 2, generator=generator)

    def held(values, packed, first=outputs_first):
        packed = packed if packed is None else (packed if first else 1 - packed)
        data = values if first else values.t()
        data = data if packed is None else pack(data.contiguous(), kind, packed)
        return quantized._Held(SimpleNamespace(data=data, packed_dim=packed, output_dim=0 if first else 1))

    weight, scales = held(q, 1), held(scale, None)
    got = quantized._dequantized(kind, weight, scales, held(zero, 0) if zeros else None)
    wanted = (q - (zero if zeros else 8 * torch.ones_like(zero)).repeat_interleave(32, 1)) * scale.repeat_interleave(
        32, 1
    )
    assert torch.equal(got, wanted)
