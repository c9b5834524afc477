"""The plan says which seam belongs to a layer and to an operation of bi_patch."""

import types

import pytest
from packaging.version import Version

from bi_patch.arming import catalog
from bi_patch.tools.verify import owners

LAYERS = {
    "cpu": {
        "RMSNorm": "norm.cpu_rms",
        "GemmaRMSNorm": "norm.cpu_rms",
        "LayerNorm": "norm.cpu_layer_certified",
        "LinearBase": "linear.cpu_dispatch",
        "ParallelLMHead": "linear.cpu_dispatch",
        "LogitsProcessor": "linear.cpu_dispatch",
        "FusedMoE": "moe.cpu_experts",
        "MoERunner": "moe.cpu_experts",
        "RoutedExperts": "moe.cpu_experts",
        "FusedMoEExperts": "moe.cpu_experts",
        "Attention": "attention.cpu_forward",
        "RotaryEmbedding": "rotary.cpu_forward",
        "RotaryEmbeddingBase": "rotary.cpu_forward",
        "TopKTopPSampler": "sampling.cpu_draw",
    },
    "cuda": {
        "RMSNorm": "norm.cuda_rms",
        "GemmaRMSNorm": "norm.cuda_rms",
        "LayerNorm": "norm.cuda_layer",
        "LinearBase": "linear.cuda_route",
        "ParallelLMHead": "linear.cuda_route",
        "LogitsProcessor": "linear.cuda_route",
        "FusedMoE": "moe.cuda_tables",
        "MoERunner": "moe.cuda_tables",
        "RoutedExperts": "moe.cuda_tables",
        "FusedMoEExperts": "moe.cuda_tables",
        "Attention": "attention.cuda_backend",
        "RotaryEmbedding": "rotary.cuda_forward",
        "RotaryEmbeddingBase": "rotary.cuda_forward",
        "TopKTopPSampler": "sampling.cuda_top_k_top_p",
    },
}
OPS = {
    "cpu": {"linear": "linear.cpu_dispatch"},
    "cuda": {"linear": "linear.cuda_route", "norm": "norm.cuda_rms", "rotary": "rotary.cuda_forward"},
}


@pytest.fixture(params=["cpu", "cuda"])
def platform(request, monkeypatch):
    """The owners of a process that is not armed, where vLLM 0.32.0 is installed for this platform."""
    monkeypatch.setattr(owners.process, "state", lambda: None)
    monkeypatch.setattr(owners, "_plan", lambda: catalog.plan(Version("0.32.0"), request.param))
    return request.param


def test_layers_by_their_class_or_one_above_it(platform):
    made = owners.Owners()
    for name, seam in LAYERS[platform].items():
        kind = type(name, (), {})
        for layer in (kind(), type("Derived", (kind,), {})()):
            assert made.seam(layer, "model.layers.0", "aten.mm") == seam
    assert made.seam(object(), "model", "aten.mm") == made.seam(None, "", "aten.mm") == ""


def test_experts_by_their_kernel(platform):
    made, experts = owners.Owners(), type("RoutedExperts", (), {})()
    runner = type("MoERunner", (), {"routed_experts": experts})()
    own = ("PackedExperts", "packed_products.cuda_kernel"), ("PackedFloatExperts", "mxfp4.cuda_kernel")
    own += (("PackedNvFp4Experts", "nvfp4_experts.cuda_kernel"),)
    for name, seam in (*own, ("Triton", LAYERS[platform]["MoERunner"])):
        kernel = types.SimpleNamespace(fused_experts=type(name, (), {})())
        experts.quant_method = types.SimpleNamespace(moe_kernel=kernel)
        assert made.seam(experts, "experts", "aten.mm") == made.seam(runner, "experts", "vllm.moe_forward") == seam


def test_operations_of_packed_experts_belong_to_the_seam_of_their_kernel(platform):
    made, name = owners.Owners(), f"bi_patch.ops.{platform}.linear"
    kernel = types.SimpleNamespace(fused_experts=type("PackedFloatExperts", (), {})())
    experts = types.SimpleNamespace(quant_method=types.SimpleNamespace(moe_kernel=kernel))
    module = types.ModuleType(name)
    exec("def call(made, layer):\n    return made.seam(layer, 'experts', 'aten.mm')", module.__dict__)
    assert module.call(made, experts) == "mxfp4.cuda_kernel"


def test_operations_by_their_module(platform):
    made = owners.Owners()
    for name, seam in OPS[platform].items():
        module = types.ModuleType(f"bi_patch.ops.{platform}.{name}")
        exec("def call(made):\n    return made.seam(None, '', 'aten.mm')", module.__dict__)
        assert module.call(made) == seam


@pytest.mark.parametrize(
    ("release", "platform", "op", "seam"),
    [
        ("0.33.0", "cuda", "vllm.all_reduce", "communicator.cuda_sum"),
        ("0.26.0", "cuda", "vllm.all_reduce", "communicator.one_stage"),
        ("0.33.0", "cuda", "vllm.reduce_scatter", "communicator.cuda_scatter"),
        ("0.26.0", "cuda", "vllm.reduce_scatter", "communicator.fusion"),
        ("0.32.0", "cpu", "vllm.all_reduce", "communicator"),
    ],
)
def test_sums_over_ranks_belong_to_the_seam_that_orders_them(release, platform, op, seam, monkeypatch):
    monkeypatch.setattr(owners.process, "state", lambda: None)
    monkeypatch.setattr(owners, "_plan", lambda: catalog.plan(Version(release), platform))
    assert owners.Owners().seam(None, "", op) == seam


def test_a_seam_around_another_one_does_not_own_its_operations(platform):
    made, layer = owners.Owners(), type("LogitsProcessor", (), {})()

    def wrapped():
        return made.seam(layer, "logits_processor", "bi_patch.linear")

    for seam in ("sampling.cuda_logits", "weights.reload_model"):
        made._codes[wrapped.__code__] = seam
        assert wrapped() == LAYERS[platform]["LogitsProcessor"]
    made._codes[wrapped.__code__] = "moe.cpu_experts"
    assert wrapped() == "moe.cpu_experts"
