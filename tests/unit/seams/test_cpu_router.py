"""Routers on CPU: the certificate gives them hidden states of the right width, and the operator finds them by layer."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from bi_patch.errors import CertificateFailed, UnsupportedFeature
from bi_patch.ops.cpu import rows
from bi_patch.seams.cpu import moe

HIDDEN, EXPERTS = 24, 8
INIT = moe._init(CPURouter.__init__)
ROUTE = moe._route(CPURouter._compute_routing)


class Layer(torch.nn.Module):
    """Stands for vLLM's MoERunner."""

    layer_name = "model.layers.0.mlp.experts"

    def __init__(self, factor=1.0, **given):
        super().__init__()

        def choose(hidden_states, gating_output, topk, renormalize):
            assert hidden_states.shape[1] == HIDDEN and gating_output.shape[1] == EXPERTS
            scores = gating_output.float() * hidden_states.float().amax(-1, keepdim=True)
            weights, ids = scores.softmax(-1).topk(topk)
            return weights * factor, ids

        self.router = CPURouter.__new__(CPURouter)
        INIT(self.router, 2, EXPERTS, custom_routing_function=choose, **given)
        self.moe_config = SimpleNamespace(hidden_dim=HIDDEN, in_dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def nothing_registered():
    yield
    rows.take_registered()


@pytest.fixture
def run(monkeypatch):
    """run(layer): the weights and ids of three rows, in a step of the engine that holds the layer."""
    x, logits = torch.ones(3, HIDDEN, dtype=torch.bfloat16), torch.arange(3.0 * EXPERTS).view(3, EXPERTS)

    context = SimpleNamespace(no_compile_layers={})
    monkeypatch.setattr("vllm.forward_context.get_forward_context", lambda: context)

    def run(layer):
        context.no_compile_layers = {layer.layer_name: layer}
        return ROUTE(layer.router, x, logits, None)

    return run


def test_the_certificate_gives_hidden_states_of_the_layers_width():
    moe.certify_routers(torch.nn.Sequential(Layer()))
    checks = rows.take_registered()
    assert [check.problem.split()[-2:] for check in checks] == [["hidden=24", "float32"], ["hidden=24", "bfloat16"]]
    for check in checks:
        inputs = check.make(5, torch.Generator().manual_seed(0))
        assert [out.shape for out in check.run(*inputs)] == [(5, 2), (5, 2)]


def certified(layer):
    moe.certify_routers(layer)
    return layer


def test_each_engine_finds_its_own_router(run):
    """Two engines of one process have layers of the same name, and may share compiled code."""
    first, second = certified(Layer(1.0)), certified(Layer(2.0))
    one, other, again = run(first)[0], run(second)[0], run(first)[0]
    assert torch.equal(one * 2, other) and torch.equal(one, again)


def test_compiled_code_of_another_model_is_an_error_by_name(run):
    layer = certified(Layer())
    layer.router.bi_patch_layer = "model.layers.1.mlp.experts"
    with pytest.raises(CertificateFailed, match="router of model.layers.1.mlp.experts"):
        run(layer)


def test_nothing_holds_the_router_of_an_engine_that_is_gone(run):
    layer = certified(Layer())
    run(layer)
    held = weakref.ref(layer.router)
    rows.take_registered()
    run(certified(Layer()))
    del layer
    gc.collect()
    assert held() is None


def test_what_no_certificate_covers_is_named(run):
    with pytest.raises(UnsupportedFeature, match="moe.cpu_router: a router outside of the layers"):
        run(Layer())
    with pytest.raises(UnsupportedFeature, match="moe.cpu_router: .*chooses experts by token ids"):
        moe.certify_routers(Layer(scoring_func="sqrtsoftplus", hash_indices_table=torch.zeros(1)))
