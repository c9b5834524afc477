"""Falcon-H1's gated activation: one operator between the projections, and vLLM's own code for other types."""

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
