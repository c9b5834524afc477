"""The seams of FP8 linears on CUDA: which layers get a certificate, what is refused, how a product is called."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bi_patch.errors import UnsupportedFeature
from bi_patch.ops.cuda import scaled_linear as ops
from bi_patch.ops.cuda.scaled_linear import Problem
from bi_patch.seams.cuda import linear, quantized, rows, scaled_linear

EIGHTH = torch.float8_e4m3fn


class LinearBase(torch.nn.Module):
    """A stand-in of vLLM's class."""

    def __init__(self, n, k, kernel, *, transposed=True, bias=False, scheme=False, scale=None, tp_size=1):
        super().__init__()
        weight = torch.zeros(n, k).to(EIGHTH)
        self.weight = torch.nn.Parameter(weight.t() if transposed else weight, requires_grad=False)
        self.bias = torch.nn.Parameter(torch.zeros(n)) if bias else None
        self.input_scale, self.tp_size = scale, tp_size
        held = SimpleNamespace(fp8_linear=kernel)
        self.quant_method = SimpleNamespace() if scheme else held
        if scheme:
            self.scheme = held


class UnquantizedLinearMethod:
    pass


def kernel(name, block=(128, 128), powers=False, static=False):
    made = type(name, (), {})()
    made.config = SimpleNamespace(out_dtype=torch.bfloat16)
    made.weight_group_shape = SimpleNamespace(row=block[0], col=block[1])
    made.quant_fp8 = SimpleNamespace(forward_cuda=lambda x, scale: (x, scale), use_ue8m0=powers, static=static)
    made.layer_param_names = ["weight", "weight_scale", "input_scale", "input_scale_ub"]
    return made


BY_ROW = "CutlassFP8ScaledMMLinearKernel"


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    module = ModuleType("linear")
    module.LinearBase, module.UnquantizedLinearMethod = LinearBase, UnquantizedLinearMethod
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.linear", module)


def test_every_layer_has_a_problem_and_a_quantizer(monkeypatch):
    monkeypatch.setattr(ops, "_folded", {})
    monkeypatch.setattr(ops, "_handed", {})
    plain = LinearBase(8, 16, None)
    plain.quant_method = UnquantizedLinearMethod()
    block = LinearBase(256, 128, kernel("DeepGemmFp8BlockScaledMMKernel", powers=True), transposed=False, bias=True)
    block.deep_gemm_warmup_provider = block.quant_method
    fixed = LinearBase(48, 64, kernel(BY_ROW, static=True), scheme=True, scale=torch.full((1,), 0.5))
    fixed.weight_scale = torch.nn.Parameter(torch.arange(48.0), requires_grad=False)
    model = torch.nn.ModuleList(
        [
            plain,
            LinearBase(32, 64, kernel(BY_ROW), bias=True, tp_size=2),
            fixed,
            block,
        ]
    )
    assert list(scaled_linear.problems(model)) == [
        Problem(32, 64, torch.bfloat16, True, 0),
        Problem(32, 64, torch.bfloat16, False, 0),  # the other ranks of a sum add no bias
        Problem(48, 64, torch.bfloat16, False, 0, True),
        Problem(256, 128, torch.bfloat16, False, 128),
    ]
    assert not hasattr(block, "deep_gemm_warmup_provider")
    ((*_, products),) = ops._folded.values()
    assert products.tolist() == [0.5 * i for i in range(48)]
    assert [ops._handed_to(p) is not None for p in scaled_linear.problems(model)] == [False, False, True, True]
    forms = [(form, k) for form, k, _ in scaled_linear.quantizers(model)]
    assert forms == [("by row K=64", 64), ("static K=64", 64), ("groups of 128 powers of two K=128", 128)]
    checks = list(rows._quantizers(model, torch.bfloat16))
    assert {check.operation for check in checks} == {"cuda.quantization"}
    # Each output of a check has the rows of its input: the checkpoint's one scale is none of them.
    assert [out.shape for out in checks[1].run(torch.ones(2, 64))] == [(2, 64)]
    assert len(checks[0].run(torch.ones(2, 64))) == 2


def test_products_of_scales_are_not_kept_where_layers_share_addresses(monkeypatch):
    """With --offload-group-size, the scales of several layers lie in one buffer, each layer's in turn."""
    monkeypatch.setattr(ops, "_folded", {})
    monkeypatch.setattr(ops, "_handed", {})
    monkeypatch.setattr("vllm.model_executor.offloader.get_offloader", type("PrefetchOffloader", (), {}))
    scales, layers = torch.full((1,), 0.5), []
    for _ in range(2):
        layers.append(LinearBase(48, 64, kernel(BY_ROW, static=True), scale=scales))
        layers[-1].weight_scale = torch.nn.Parameter(torch.arange(48.0), requires_grad=False)
    assert [problem.static for problem in scaled_linear.problems(torch.nn.ModuleList(layers))] == [True, True]
    assert not ops._folded


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (kernel("MarlinFP8ScaledMMLinearKernel"), "0 runs on MarlinFP8ScaledMMLinearKernel"),
        (None, "0 runs on SimpleNamespace"),
        (kernel("CutlassFp8BlockScaledMMKernel", (64, 128)), "blocks of 64 x 128"),
    ],
)
def test_another_kernel_is_refused_by_name(held, said):
    model = torch.nn.ModuleList([LinearBase(256, 128, held, transposed=False)])
    with pytest.raises(UnsupportedFeature, match=said):
        quantized.check(model)
        list(scaled_linear.problems(model))


def test_a_padded_weight_is_multiplied_whole_and_cut(monkeypatch):
    called = []

    def product(x, weight, x_scale, weight_scale, bias, group, dtype, static):
        called.append((tuple(x.shape), tuple(weight.shape), tuple(bias.shape), group, static))
        return torch.arange(32.0).repeat(x.shape[0], 1)

    monkeypatch.setattr(scaled_linear, "_op", lambda: product)
    apply = scaled_linear._by_row(None)
    given = {"A": torch.zeros(3, 30), "B": torch.zeros(32, 32).t(), "As": None, "Bs": None, "bias": torch.zeros(20)}
    held = SimpleNamespace(logical_output_size=20, quant_fp8=SimpleNamespace(static=True))
    out = apply(held, **given, out_dtype=torch.bfloat16, output_shape=[1, 3, 32])
    assert called == [((3, 32), (32, 32), (32,), 0, True)] and out.shape == (1, 3, 20) and out[0, 0, -1] == 19


def test_the_scale_of_a_whole_weight_is_repeated_for_each_row(monkeypatch):
    module = ModuleType("utils")
    module.replace_parameter = lambda layer, name, value: setattr(layer, name, torch.nn.Parameter(value))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.utils", module)
    layer = LinearBase(32, 64, None)
    layer.weight_scale = torch.nn.Parameter(torch.tensor(0.5))
    held = SimpleNamespace(layer_param_names=["weight", "weight_scale", "input_scale", "input_scale_ub"])
    close = scaled_linear._loaded(lambda self, layer: None)
    close(held, layer)
    assert layer.weight_scale.tolist() == [0.5] * 32
    kept = layer.weight_scale
    close(held, layer)
    assert layer.weight_scale is kept


@pytest.mark.parametrize(("quantization", "said"), [(None, False), ("fp8", True)])
def test_quantization_stays_a_kernel_of_its_own(quantization, said):
    passes = SimpleNamespace(fuse_norm_quant=True, fuse_act_quant=True)
    config = SimpleNamespace(
        model_config=SimpleNamespace(quantization=quantization),
        compilation_config=SimpleNamespace(custom_ops=["none"], pass_config=passes),
    )
    scaled_linear._custom_op(config)
    assert ("+quant_fp8" in config.compilation_config.custom_ops) == said
    assert passes.fuse_norm_quant == passes.fuse_act_quant == (not said) and not hasattr(passes, "fuse_attn_quant")


def test_code_of_the_compiler_does_not_quantize():
    config = SimpleNamespace(
        model_config=SimpleNamespace(quantization="fp8"),
        compilation_config=SimpleNamespace(custom_ops=["-quant_fp8"], pass_config=SimpleNamespace()),
    )
    with pytest.raises(UnsupportedFeature, match="custom_ops has -quant_fp8"):
        scaled_linear._custom_op(config)


def test_new_weights_of_a_quantized_model_are_refused_by_name():
    quantized.refuse_update(torch.nn.Linear(4, 4))
    with pytest.raises(UnsupportedFeature, match="linear.cuda_update: .* quantized LinearBase"):
        quantized.refuse_update(torch.nn.ModuleList([torch.nn.Linear(4, 4), LinearBase(8, 16, None)]))


def test_products_of_scales_follow_new_weights(monkeypatch):
    """Once new weights of such a layer are allowed, the engine must not compute with the products of the old scales."""
    monkeypatch.setattr(ops, "_folded", {})
    monkeypatch.setattr("vllm.model_executor.offloader.get_offloader", type("NoopOffloader", (), {}))
    fixed = LinearBase(48, 64, kernel(BY_ROW, static=True), scheme=True, scale=torch.full((1,), 0.5))
    fixed.weight_scale = torch.nn.Parameter(torch.arange(48.0), requires_grad=False)
    model = torch.nn.ModuleList([fixed])
    scaled_linear.keep_products(model)
    ((*_, products),) = ops._folded.values()
    fixed.weight_scale.data.fill_(4.0)
    with pytest.raises(UnsupportedFeature, match="linear.cuda_update"):
        linear._settle(model)
    monkeypatch.setattr(quantized, "refuse_update", lambda model: None)
    linear._settle(model)
    assert products.tolist() == [2.0] * 48
