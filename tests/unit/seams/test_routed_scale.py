"""The factor of routed experts: an operator rounds, for bf16 on the experts' output, for fp16 on the shared output."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.ops.cuda import routed
from bi_patch.seams.cuda import moe


@pytest.fixture
def scaled(monkeypatch):
    monkeypatch.setattr(routed, "define_op", lambda: None)
    monkeypatch.setattr(routed, "scale", lambda x, factor: (x * factor).to(x.dtype))
    return moe._routed(None)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_the_factor_is_that_of_vllms_code(scaled, dtype, shared, factor):
    runner = pytest.importorskip("vllm.model_executor.layers.fused_moe.runner.moe_runner").MoERunner
    layer = SimpleNamespace(routed_scaling_factor=factor)
    given = [torch.randn(3, 8).to(dtype) if there else None for there in (shared, True)]
    want = runner._maybe_apply_routed_scale_to_output(layer, *(x if x is None else x.clone() for x in given))
    got = scaled(layer, *given)
    for a, b in zip(got, want, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_the_operator_keeps_shape_and_type():
    routed.define_op()
    out = torch.ops.bi_patch.routed_scale(torch.empty(3, 8, dtype=torch.bfloat16, device="meta"), 2.5)
    assert out.shape == (3, 8) and out.dtype == torch.bfloat16
