"""Gated activations: one operator for rows of 16-bit elements, and vLLM's own code for others."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.ops.cuda import activation as ops
from bi_patch.seams.cuda import activation

FACTORS = 0.8838834764831844, 0.125


@pytest.fixture
def layer():
    torch.manual_seed(3)
    up, down = torch.randn(32, 12), torch.randn(12, 16)
    return SimpleNamespace(
        intermediate_size=32,
        tp_size=2,
        gate_multiplier=FACTORS[0],
        down_multiplier=FACTORS[1],
        gate_up_proj=lambda x: (torch.nn.functional.linear(x, up.to(x.dtype)), None),
        down_proj=lambda x: (torch.nn.functional.linear(x, down.to(x.dtype)), None),
        act_fn=lambda x: torch.nn.functional.silu(x[:, :16]) * x[:, 16:],
    )


def test_the_layer_computes_what_vllms_code_computes(layer, monkeypatch):
    model = pytest.importorskip("vllm.model_executor.models.falcon_h1").FalconH1MLP
    x = torch.randn(5, 12).bfloat16()
    layer.down_proj = lambda x: (x, None)
    given = []

    def scaled(x, factor):
        given.append(factor)
        return layer.act_fn(torch.cat([x[:, :16] * factor, x[:, 16:]], 1))

    monkeypatch.setattr(ops, "scaled_silu_and_mul", scaled)
    assert torch.equal(activation._scaled(None)(layer, x), model.forward(layer, x)) and given == [FACTORS[0]]


def test_other_types_take_vllms_code(layer):
    assert activation._scaled(lambda self, x: "stock")(layer, torch.zeros(1, 12)) == "stock"


def test_compiled_code_calls_the_operator(layer):
    def forward(x):
        return activation._scaled(None)(layer, x)

    layer.gate_up_proj = layer.down_proj = lambda x: (x, None)
    out = torch.compile(forward, backend="eager", fullgraph=True)(
        torch.empty(5, 32, dtype=torch.bfloat16, device="meta")
    )
    assert out.shape == (5, 16) and out.dtype == torch.bfloat16


def test_rows_of_16_bit_elements_take_the_operator(monkeypatch):
    monkeypatch.setattr(ops, "scaled_silu_and_mul", lambda x: "bundled")
    forward = activation._silu(lambda self, x: "stock")
    assert forward.__name__ == "forward_cuda"  # certificates of rows are named after it
    rows = torch.zeros(3, 32, dtype=torch.bfloat16)
    assert [forward(None, x) for x in (rows, rows.half())] == ["bundled"] * 2
    assert [forward(None, x) for x in (rows.float(), rows[:, :24], rows[None])] == ["stock"] * 3


def test_which_activations_of_a_model_get_a_certificate():
    layers = pytest.importorskip("vllm.model_executor.layers.activation")
    config = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
    act, model = torch.nn.Module(), torch.nn.Sequential(*(torch.nn.Module() for _ in range(3)))
    act.__class__ = type("Act", (layers.SiluAndMul,), {})
    kinds = ("PackedFloatExperts", "swigluoai"), ("PackedExperts", "silu"), ("Other", "swigluoai")
    for layer, (name, kind) in zip(model, kinds, strict=True):
        layer.quant_method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=type(name, (), {})()))
        layer.moe_config = SimpleNamespace(activation=SimpleNamespace(value=kind))
    assert [*activation.forms(model, config)] == [(ops.PAIRS, torch.bfloat16)]
    assert [*activation.forms(torch.nn.Sequential(act, torch.nn.Linear(2, 2)), config)] == [(ops.SILU, torch.bfloat16)]
