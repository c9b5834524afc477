"""On a Hopper GPU: a layer of experts in NVFP4 on bi_patch's kernel gives a token its bits among any others."""

from types import SimpleNamespace

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
    ),
]
EXPERTS, N, K, TOP = 16, 256, 384, 4


@pytest.fixture
def vllm_config():
    pytest.importorskip("vllm.model_executor.layers.fused_moe.oracle.nvfp4", reason="vLLM has no such experts")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.v1.worker import workspace

    config = VllmConfig()
    if not workspace.is_workspace_manager_initialized():
        workspace.init_workspace_manager(torch.device("cuda"))
    with set_current_vllm_config(config), set_forward_context(None, config):
        yield config


@pytest.fixture(params=[True, False], ids=["weights alone", "activations in NVFP4"])
def layer(request, vllm_config, monkeypatch, tmp_path):
    """A layer on bi_patch's kernel with its certificates, and its weights in fp64."""
    from vllm.model_executor.layers.fused_moe import config as configs
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as module,
    )

    from bi_patch.ops.cuda import linear, machine, packed_experts
    from bi_patch.seams.cuda import nvfp4_experts as seam
    from bi_patch.seams.cuda import packed_products

    machine.forbid_split_k()
    linear.define_op()
    monkeypatch.setattr(packed_experts, "_able", {})
    for name, close in (
        ("select_nvfp4_moe_backend", seam._chosen),
        ("convert_to_nvfp4_moe_kernel_format", seam._packed),
    ):
        monkeypatch.setattr(module, name, close(getattr(module, name)))
    moe = configs.FusedMoEConfig(
        num_experts=EXPERTS,
        experts_per_token=TOP,
        hidden_dim=K,
        intermediate_size=N,
        num_local_experts=EXPERTS,
        num_logical_experts=EXPERTS,
        activation=MoEActivation.SILU,
        device="cuda",
        routing_method=configs.RoutingMethodType.Renormalize,
        moe_parallel_config=configs.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
    )
    method, held = module.CompressedTensorsW4A4Nvfp4MoEMethod(moe, use_a16=request.param), torch.nn.Module()
    given = {"activation": MoEActivation.SILU, "global_num_experts": EXPERTS, "expert_map": None, "moe_config": moe}
    given |= {"apply_router_weight_on_input": False, "intermediate_size_per_partition": N}
    for key, value in given.items():
        setattr(held, key, value)
    held.quant_method, held._expert_routing_tables = method, lambda: None
    with torch.device("cuda"):
        method.create_weights(held, EXPERTS, K, N, torch.bfloat16, weight_loader=None)
    exact = [fill(held, key) for key in ("w13", "w2")]
    method.process_weights_after_loading(held)
    assert type(method.moe_kernel.fused_experts).__name__ == "PackedNvFp4Experts"
    problems = list(packed_products.problems(torch.nn.ModuleList([held])))
    made = packed_experts.certify(problems, 600, tmp_path)
    assert len(made) == 2 and all(certificate.passed for certificate in made), [one.evidence for one in made]
    assert all(len(certificate.algorithms) == len(packed_experts.runnable(problems[0])) for certificate in made)

    def run(x, weights, ids):
        return method.apply(held, x, weights, ids, None, None).clone()

    return SimpleNamespace(run=run, exact=exact)


def fill(layer, name):
    """Random floats, scales and numbers of experts. Returns the weights in fp64 [E, n, k]."""
    generator = torch.Generator("cuda").manual_seed(len(name))
    words = getattr(layer, f"{name}_weight_packed").data
    words.random_(0, 256, generator=generator)
    scale = getattr(layer, f"{name}_weight_scale").data
    scale.copy_(32 * (0.5 + torch.rand(scale.shape, generator=generator, device="cuda")))
    by = 32 * 2.9 * (2 * words.shape[2]) ** 0.5 * (0.5 + torch.rand(EXPERTS, generator=generator, device="cuda"))
    divides = getattr(layer, f"{name}_weight_global_scale").data
    divides.copy_(by[:, None] if divides.ndim == 2 else by)
    getattr(layer, f"{name}_input_global_scale").data.fill_(1)
    q = torch.stack((words & 15, words >> 4), -1).flatten(2).long()
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device="cuda")
    value = table[q & 7] * torch.where(q > 7, -1, 1)
    return value * scale.double().repeat_interleave(16, 2) / by.double()[:, None, None]


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
    w13, w2 = layer.exact
    want = torch.zeros((37, K), dtype=torch.float64, device="cuda")
    for expert in range(EXPERTS):
        gate, up = (x.double() @ w13[expert].T).bfloat16().double().chunk(2, -1)
        inner = (torch.nn.functional.silu(gate).bfloat16().double() * up).bfloat16().double()
        want += inner @ w2[expert].T * (weights * (ids == expert)).sum(1, keepdim=True).double()
    got = layer.run(x, weights, ids).double()
    assert float((got - want).norm() / want.norm()) < 0.01
