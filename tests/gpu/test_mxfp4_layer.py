"""On a Hopper GPU: gpt-oss's layer of experts in MXFP4 on bi_patch's kernel gives a token its bits among any others."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
    ),
]
EXPERTS, N, K, TOP = 16, 352, 416, 4  # no multiples of 128


@pytest.fixture
def vllm_config(monkeypatch):
    oracle = pytest.importorskip("vllm.model_executor.layers.fused_moe.oracle.mxfp4", reason="vLLM has no such experts")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.v1.worker import workspace

    monkeypatch.setattr(oracle, "_user_moe_activation_override", lambda: None)  # there is no model
    config = VllmConfig()
    if not workspace.is_workspace_manager_initialized():
        workspace.init_workspace_manager(torch.device("cuda"))
    with set_current_vllm_config(config), set_forward_context(None, config):
        yield config


@pytest.fixture
def layer(vllm_config, monkeypatch, tmp_path):
    """A layer on bi_patch's kernel with its certificates, and its weights and biases in fp64."""
    from vllm.model_executor.layers.fused_moe import config as configs
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.quantization import mxfp4 as module

    from bi_patch.ops.cuda import linear, machine, packed_experts
    from bi_patch.seams.cuda import mxfp4 as seam
    from bi_patch.seams.cuda import packed_products

    machine.forbid_split_k()
    linear.define_op()
    monkeypatch.setattr(packed_experts, "_able", {})
    name = "convert_gpt_oss_weight_to_mxfp4_moe_kernel_format"
    monkeypatch.setattr(module, name, seam._packed(getattr(module, name)))
    kind = module.GptOssMxfp4MoEMethod
    monkeypatch.setattr(kind, "__init__", seam._chosen(kind.__init__))
    moe = configs.FusedMoEConfig(
        num_experts=EXPERTS,
        experts_per_token=TOP,
        hidden_dim=K,
        intermediate_size=N,
        num_local_experts=EXPERTS,
        num_logical_experts=EXPERTS,
        activation=MoEActivation.SWIGLUOAI,
        device="cuda",
        routing_method=configs.RoutingMethodType.Renormalize,
        moe_parallel_config=configs.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        has_bias=True,
    )
    method, held = kind(moe), torch.nn.Module()
    assert method.maybe_roundup_sizes(K, N, torch.bfloat16, moe.moe_parallel_config) == (K, N)
    given = {"activation": MoEActivation.SWIGLUOAI, "global_num_experts": EXPERTS, "expert_map": None}
    given |= {"apply_router_weight_on_input": False, "intermediate_size_per_partition": N, "moe_config": moe}
    for key, value in given.items():
        setattr(held, key, value)
    held.quant_method, held._expert_routing_tables = method, lambda: None
    with torch.device("cuda"):
        method.create_weights(held, EXPERTS, K, N, torch.bfloat16, weight_loader=None)
    exact = [fill(held, key) for key in ("w13", "w2")]
    method.process_weights_after_loading(held)
    assert type(method.moe_kernel.fused_experts).__name__ == "PackedFloatExperts"
    problems = list(packed_products.problems(torch.nn.ModuleList([held])))
    made = packed_experts.certify(problems, 600, tmp_path)
    assert len(made) == 2 and all(certificate.passed for certificate in made), [one.evidence for one in made]
    assert all(len(certificate.algorithms) == len(packed_experts.runnable(problems[0])) for certificate in made)

    def run(x, weights, ids):
        return method.apply(held, x, weights, ids, None, None).clone()

    return SimpleNamespace(run=run, exact=exact)


def fill(layer, name):
    """Random floats, exponents and biases. Returns the weights and the biases in fp64 [E, n, k] and [E, n]."""
    generator = torch.Generator("cuda").manual_seed(len(name))
    words = getattr(layer, f"{name}_weight").data
    words.random_(0, 256, generator=generator)
    exponent = getattr(layer, f"{name}_weight_scale").data
    exponent.copy_(torch.randint(118, 122, exponent.shape, generator=generator, device="cuda"))
    bias = getattr(layer, f"{name}_bias").data
    bias.normal_(generator=generator)
    q = torch.stack((words & 15, words >> 4), -1).flatten(2).long()
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device="cuda")
    value = table[q & 7] * torch.where(q > 7, -1, 1)
    return value * torch.exp2(exponent.double() - 127).repeat_interleave(32, 2), bias.double()


def routed(rows):
    generator = torch.Generator("cuda").manual_seed(rows)
    x = torch.randn((rows, K), generator=generator, device="cuda").bfloat16()
    scores = torch.rand((rows, EXPERTS), generator=generator, device="cuda")
    weights, ids = scores.softmax(-1).topk(TOP, -1)
    return x, weights, ids.int()


def test_a_token_has_its_bits_among_any_others(layer):
    given = routed(600)
    want = layer.run(*given)
    for rows in (1, 2, 5, 16, 33, 64, 97, 200, 513):
        for at in (0, 600 - rows):
            part = slice(at, at + rows)
            assert torch.equal(layer.run(*(t[part].contiguous() for t in given)), want[part]), (rows, at)


def test_a_captured_graph_has_the_bits_of_eager_calls(layer):
    for rows in (1, 9, 150):
        given, other = routed(rows), routed(rows + 1000)
        want = layer.run(*given)
        graph, held = torch.cuda.CUDAGraph(), [t[:rows].clone() for t in other]
        layer.run(*held)
        with torch.cuda.graph(graph):
            out = layer.run(*held)
        for to, value in zip(held, given, strict=True):
            to.copy_(value)
        graph.replay()
        assert torch.equal(out, want), rows


def test_experts_are_near_fp64(layer):
    x, weights, ids = routed(37)
    (w13, bias13), (w2, bias2) = layer.exact
    want = torch.zeros((37, K), dtype=torch.float64, device="cuda")
    for expert in range(EXPERTS):
        up = (x.double() @ w13[expert].T + bias13[expert]).bfloat16().double()
        gate, up = up[:, ::2].clamp(max=7), up[:, 1::2].clamp(-7, 7)
        inner = ((up + 1) * gate * torch.sigmoid(1.702 * gate)).bfloat16().double()
        by = (weights * (ids == expert)).sum(1, keepdim=True).double()
        want += (inner @ w2[expert].T + bias2[expert]) * by
    got = layer.run(x, weights, ids).double()
    assert float((got - want).norm() / want.norm()) < 0.01
