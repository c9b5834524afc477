"""Experts in NVFP4 on bi_patch's kernel: which layers get it, which floats it gets, and what runs around."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from bi_patch.errors import CertificateFailed, UnsupportedFeature
from bi_patch.kernels import packing
from bi_patch.ops.cuda import packed_experts as ops
from bi_patch.seams.cuda import nvfp4_experts as seam
from bi_patch.seams.cuda import packed_experts, packed_products

E, N, K, TOP = 4, 128, 256, 2  # N: of a token's activations
SIZES = ((2 * N, K), (K, N))
CHECKPOINTS = ("compressed-tensors", "modelopt")
EXCHANGES = tuple(f"use_fi_nvl_{sides}_sided_kernels" for sides in ("one", "two"))  # between ranks


def oracle():
    return pytest.importorskip("vllm.model_executor.layers.fused_moe.oracle.nvfp4")


def given(n, k):
    """Random floats of each expert: what vLLM loads, with numbers that multiply, and the weights in fp32."""
    generator = torch.Generator().manual_seed(n + k)
    q = torch.randint(0, 16, (E, n, k), generator=generator, dtype=torch.uint8)
    scale = (torch.rand((E, n, k // 16), generator=generator) * 32 + 16).to(torch.float8_e4m3fn)
    whole = 1 / (32 * 2.9 * k**0.5 * (1 + torch.rand(E, generator=generator)))
    value = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[q.long() & 7] * torch.where(q > 7, -1, 1)
    words = q[..., 0::2] | q[..., 1::2] << 4
    return (q, words, scale, whole), value * scale.float().repeat_interleave(16, 2) * whole[:, None, None]


def ranks(**changed):
    sizes = dict.fromkeys(("tp_size", "pcp_size", "dp_size", "ep_size", "sp_size"), 1)
    return SimpleNamespace(**sizes | {"use_ep": False, "enable_eplb": False} | changed)


def config(**changed):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    held = {"moe_backend": "auto", "is_lora_enabled": False, "intermediate_size_per_partition": N, "hidden_dim": K}
    held |= {"in_dtype": torch.bfloat16, "activation": MoEActivation.SILU, "has_bias": False, "is_act_and_mul": True}
    held |= {f"swiglu_{name}": None for name in ("limit", "alpha", "beta")}
    return SimpleNamespace(**held | {"moe_parallel_config": ranks(), "max_capture_size": 8} | changed)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(ops, "served", lambda: True)
    monkeypatch.setattr(seam, "_unsupported", lambda *_: "")


@pytest.mark.parametrize("at_once", [1, 1 << 27])
def test_floats_are_packed_for_the_kernel(monkeypatch, at_once):
    monkeypatch.setattr(seam, "_AT_ONCE", at_once)  # one expert at a time, or all
    (q, words, scale, whole), _ = given(*SIZES[0])
    data, scales, wholes = seam.pack(words, scale, whole)
    want = packing.pack_scaled_experts(q, scale, whole)
    assert data.shape == words.shape and torch.equal(data.flatten(), want.data)
    assert torch.equal(scales, want.scale) and torch.equal(wholes, want.whole)
    assert packing.Packed(data, scales, None, 4, 16, wholes).shape == (2 * N, K)


def method_of(kind, monkeypatch, weights_alone, **changed):
    """vLLM's method for a checkpoint of a tool, on bi_patch's kernel."""
    if kind == "modelopt":
        from vllm.model_executor.layers.quantization import modelopt as module

        scheme = SimpleNamespace(
            quant_method="W4A16_NVFP4" if weights_alone else "NVFP4",
            moe_activation_override=None,
            group_size=16,
            is_checkpoint_nvfp4_serialized=True,
        )
        make = lambda: module.ModelOptNvFp4FusedMoE(scheme, config(**changed))  # noqa: E731
    else:
        from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
            compressed_tensors_moe_w4a4_nvfp4 as module,
        )

        make = lambda: module.CompressedTensorsW4A4Nvfp4MoEMethod(config(**changed), use_a16=weights_alone)  # noqa: E731
    monkeypatch.setattr(module, "select_nvfp4_moe_backend", seam._chosen(module.select_nvfp4_moe_backend))
    convert = module.convert_to_nvfp4_moe_kernel_format
    monkeypatch.setattr(module, "convert_to_nvfp4_moe_kernel_format", seam._packed(convert))
    return make(), module


@pytest.mark.parametrize("weights_alone", [True, False])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_vllms_method_loads_packed_weights(monkeypatch, hopper, kind, weights_alone):
    method, module = method_of(kind, monkeypatch, weights_alone)
    assert method.experts_cls is seam.own() and method.experts_cls.__name__ == packed_experts.NVFP4
    made, held = [], torch.nn.Module()
    kernel = SimpleNamespace(fused_experts=SimpleNamespace(process_weights_after_loading=lambda layer: None))
    monkeypatch.setattr(module, "make_nvfp4_moe_kernel", lambda **given: made.append(given) or kernel)
    held.quant_method, held._expert_routing_tables = method, lambda: None
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr("vllm.model_executor.parameter.get_tensor_model_parallel_world_size", lambda: 1)
    method.create_weights(held, E, K, N, torch.bfloat16, weight_loader=lambda *_: None, global_num_experts=E)
    wanted, other = {}, kind == "modelopt"
    for part, size in zip(("w13", "w2"), SIZES, strict=True):
        (q, words, scale, whole), _ = given(*size)
        divides = 1 / whole
        getattr(held, f"{part}_weight" if other else f"{part}_weight_packed").data.copy_(words)
        getattr(held, f"{part}_weight_scale").data.copy_(scale)
        number = getattr(held, f"{part}_weight_scale_2" if other else f"{part}_weight_global_scale").data
        loaded = whole if other else divides
        number.copy_(loaded[:, None] if number.ndim == 2 else loaded)
        getattr(held, f"{part}_input_scale" if other else f"{part}_input_global_scale").data.fill_(1)
        wanted[part] = packing.pack_scaled_experts(q, scale, whole if other else 1 / divides)
    method.process_weights_after_loading(held)
    assert [each["experts_cls"] for each in made] == [seam.own()]
    of = made[0]["moe_quant_config"]
    assert of.quant_dtype is None and of.w1_zp is None and of.a1_gscale is None
    for part, scale, whole in (("w13", of.w1_scale, of.g1_alphas), ("w2", of.w2_scale, of.g2_alphas)):
        assert torch.equal(getattr(held, f"{part}_weight").flatten(), wanted[part].data)
        assert torch.equal(scale, wanted[part].scale) and torch.equal(whole, wanted[part].whole)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"moe_backend": "marlin"}, "--moe-backend marlin"),
        ({"is_lora_enabled": True}, "LoRA"),
        ({"in_dtype": torch.float16}, "activations in torch.float16"),
        ({"hidden_dim": 2880}, "sizes 128 and 2880"),
        ({"intermediate_size_per_partition": 192}, "sizes 192 and 256"),
        ({"activation": "gelu"}, "another activation than SwiGLU"),
        ({"swiglu_limit": 7.0}, "a clamped or scaled SwiGLU"),
        ({"swiglu_alpha": 1.7}, "a clamped or scaled SwiGLU"),
        ({"has_bias": True}, "a bias"),
        *(
            ({"moe_parallel_config": ranks(**{size: 2})}, "several ranks that do not split each expert")
            for size in seam._ALONE
        ),
        ({"moe_parallel_config": ranks(use_ep=True)}, "expert parallelism"),
        ({"moe_parallel_config": ranks(enable_eplb=True)}, "expert parallelism"),
    ],
)
def test_all_other_layers_are_refused(hopper, changed, words):
    choose = seam._chosen(lambda *_: pytest.fail("vLLM's kernel"))
    assert choose(config(), None, None)[1] is seam.own()
    assert choose(config(moe_parallel_config=ranks(tp_size=2)), None, None)[1] is seam.own()
    with pytest.raises(UnsupportedFeature, match=f"nvfp4_experts.cuda_kernel: .* in NVFP4 with {words}"):
        choose(config=config(**changed), weight_key=None, activation_key=None)


def test_other_gpus_and_what_vllms_checks_refuse_are_refused(monkeypatch, hopper):
    choose = seam._chosen(lambda *_: pytest.fail("vLLM's kernel"))
    with monkeypatch.context() as patch:
        patch.setattr(ops, "served", lambda: False)
        with pytest.raises(UnsupportedFeature, match="another GPU than Hopper"):
            choose(config(), None, None)
    monkeypatch.setattr(seam, "_unsupported", lambda *_: "kernel does not support silu activation")
    with pytest.raises(UnsupportedFeature, match="NVFP4 with kernel does not support silu activation"):
        choose(config(), None, None)


def test_vllms_own_checks_are_asked(monkeypatch):
    from vllm.model_executor.layers.quantization.utils import quant_utils

    def asked(weights=quant_utils.kNvfp4Static, rows=None, **changed):
        kinds = dict.fromkeys(("use_batched_activation_format", *EXCHANGES), False)
        more = {"has_hash_routing": False, "require_decomposed_backend": False, "routing_method": None}
        given = config(moe_parallel_config=ranks(**kinds | changed), router_logits_dtype=torch.float32, **more)
        return seam._unsupported(given, weights, rows)

    monkeypatch.setattr(seam.own(), "_supports_current_device", staticmethod(lambda: True))
    assert asked() == asked(rows=quant_utils.kNvfp4Dynamic) == ""
    assert "quantization scheme" in asked(rows=quant_utils.kNvfp4DynamicToken)
    assert "quantization scheme" in asked(quant_utils.kInt4Static)
    assert "batched_experts" in asked(use_batched_activation_format=True)
    assert all("parallel config" in asked(**{name: True}) for name in EXCHANGES)
    monkeypatch.setattr(seam.own(), "_supports_current_device", staticmethod(lambda: False))
    assert "current device" in asked()


def test_only_weights_in_nvfp4_are_taken():
    from vllm.model_executor.layers.quantization.utils import quant_utils

    takes = seam.own()._supports_quant_scheme
    assert takes(quant_utils.kNvfp4Static, None) and takes(quant_utils.kNvfp4Static, quant_utils.kNvfp4Dynamic)
    assert not takes(quant_utils.kNvfp4Static, quant_utils.kNvfp4DynamicToken)
    assert not takes(quant_utils.kInt4Static, None) and not takes(quant_utils.kMxfp4Static, None)
    assert issubclass(seam.own(), packed_products.own())


def test_weights_of_another_kernel_are_converted_by_vllm():
    seen = []
    convert = seam._packed(lambda *given, **named: seen.append((given, named)))
    held = SimpleNamespace(quant_method=SimpleNamespace(experts_cls=object))
    convert("MARLIN", held, *range(8), is_act_and_mul=True)
    convert("MARLIN", SimpleNamespace(), *range(8), True)
    assert seen == [
        (("MARLIN", held, *range(8)), {"is_act_and_mul": True}),
        (("MARLIN", seen[1][0][1], *range(8), True), {}),
    ]


def test_scales_that_the_kernel_does_not_hold_are_refused():
    (first, second), held = (given(*size)[0] for size in SIZES), SimpleNamespace()
    held.quant_method = SimpleNamespace(experts_cls=seam.own())
    first[2].view(torch.uint8)[1, 2, 3] = 127  # NaN
    convert = seam._packed(lambda *_: pytest.fail("vLLM's kernel"))
    with pytest.raises(UnsupportedFeature, match="nvfp4_experts.cuda_weights: .* not finite, or out of range"):
        convert("MARLIN", held, *first[1:], None, *second[1:], None, is_act_and_mul=True)


@pytest.fixture
def layer(float_experts):
    """A layer of experts on the kernel, and the weights of its products."""
    dense = {}

    def check(x, data, bias):
        assert data.floats and data.group == 16 and data.zero is None and bias is None
        weight, whole = dense[data.data.data_ptr()]
        assert torch.equal(data.whole, whole * 2.0**7) and data.shape == weight.shape[1:]
        return weight

    float_experts.begin(seam, check)
    held = torch.nn.Module()
    held.quant_method = SimpleNamespace(experts_cls=seam.own())
    (first, w13), (second, w2) = (given(*size) for size in SIZES)
    converted = seam._packed(None)("any", held, *first[1:], "a13", *second[1:], "a2", is_act_and_mul=True)
    assert converted[3] is converted[7] is None
    for name, value in (("w13_weight", converted[0]), ("w2_weight", converted[4])):
        setattr(held, name, torch.nn.Parameter(value, requires_grad=False))
    dense[held.w13_weight.data_ptr()] = w13, first[3]
    dense[held.w2_weight.data_ptr()] = w2, second[3]
    experts = object.__new__(seam.own())
    experts.moe_config = config()
    experts.quant_config = oracle().make_nvfp4_moe_quant_config(
        oracle().NvFp4MoeBackend.MARLIN, converted[1], converted[5], converted[2], converted[6], None, None
    )
    float_experts.end(held, experts, swiglu)
    return held, (w13, w2)


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def run(held, x, weights, ids):
    output, spaces = torch.empty_like(x), torch.full((2, len(x) * TOP * 2 * N + 1), float("nan")).bfloat16()
    experts = held.quant_method.moe_kernel.fused_experts
    experts.apply(
        output, x, held.w13_weight, held.w2_weight, weights, ids, config().activation, E, None, None, None,
        spaces[0], spaces[1], None, False,
    )  # fmt: skip
    return output


def test_a_layer_is_two_products_around_the_activation(layer):
    held, (w13, w2) = layer
    x = torch.randn(9, K).bfloat16()
    weights, ids = torch.rand(9, E).softmax(-1).topk(TOP, -1)
    want = torch.zeros(x.shape)
    for token in range(9):
        for expert, score in zip(ids[token].tolist(), weights[token], strict=True):
            up = (x[token].float() @ w13[expert].T).bfloat16().float()
            want[token] += (swiglu(up).bfloat16().float() @ w2[expert].T * score).bfloat16()
    assert (run(held, x, weights, ids.int()).float() - want).norm() < 4e-3 * want.norm()


def test_each_product_has_a_problem_and_needs_its_certificate(layer):
    held, _ = layer
    first, second = packed_products.problems(torch.nn.ModuleList([held, torch.nn.Linear(2, 2)]))
    assert first == ops.Problem(2 * N, K, torch.bfloat16, False, 16, False, True) and first.whole
    assert str(second) == f"experts N={K} K={N} e2m1 groups of 16 bfloat16"
    x, weights, ids = torch.randn(2, K).bfloat16(), torch.ones(2, TOP), torch.tensor([[0, 1], [2, 3]]).int()
    with pytest.raises(CertificateFailed, match="torch.float16 and scales of torch.uint8"):
        run(held, x.half(), weights, ids)
    ops._able.clear()
    with pytest.raises(CertificateFailed, match="cuda.packed_products: experts N=256 K=256 e2m1 .*no certificate"):
        run(held, x, weights, ids)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_random_weights_have_the_spread_of_others(kind):
    from bi_patch.tools.verify import weights

    made, experts = torch.nn.Module(), torch.nn.Module()
    made.add_module("experts", experts)
    packed_name, whole = (
        ("weight", "weight_scale_2") if kind == "modelopt" else ("weight_packed", "weight_global_scale")
    )
    for part, (n, k), one in (("w13", SIZES[0], (E, 2)), ("w2", SIZES[1], (E,))):
        for name, value in (
            (packed_name, torch.zeros((E, n, k // 2), dtype=torch.uint8)),
            ("weight_scale", torch.zeros((E, n, k // 16)).to(torch.float8_e4m3fn)),
            (whole, torch.zeros(one)),
        ):
            experts.register_parameter(f"{part}_{name}", torch.nn.Parameter(value, requires_grad=False))
    weights.fill(made, 7)
    code = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for part, (_, k) in (("w13", SIZES[0]), ("w2", SIZES[1])):
        held = {name: getattr(experts, f"{part}_{name}") for name in (packed_name, "weight_scale", whole)}
        nibbles = (held[packed_name][..., None].int() >> torch.tensor([0, 4]) & 15).flatten(2)
        value = code[nibbles & 7] * torch.where(nibbles > 7, -1, 1)
        by = held[whole].flatten()[0] if kind == "modelopt" else 1 / held[whole].flatten()[0]
        spread = (value * held["weight_scale"].float().repeat_interleave(16, 2) * by).std()
        assert 0.8 < spread * k**0.5 < 1.3 and held[whole].unique().numel() == 1


def test_the_layer_has_a_row_check(layer):
    held, _ = layer
    assert packed_experts.covers(held) and packed_experts.OWNED[packed_experts.NVFP4] == seam.SEAMS[0].name
