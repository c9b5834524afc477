"""gpt-oss's experts in MXFP4 on bi_patch's kernel: which layers get it, which floats it gets, and what runs around."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from bi_patch.errors import CertificateFailed, UnsupportedFeature
from bi_patch.kernels import packing
from bi_patch.ops.cuda import packed_experts as ops
from bi_patch.seams.cuda import mxfp4 as seam
from bi_patch.seams.cuda import packed_experts, packed_products

E, N, K, TOP = 4, 96, 160, 2  # N: of a token's activations. Neither is a multiple of 128
SIZES = ((2 * N, K), (K, N))


def oracle():
    return pytest.importorskip("vllm.model_executor.layers.fused_moe.oracle.mxfp4")


def given(n, k):
    """Random floats of each expert: what vLLM loads, and the weights in fp32 [E, n, k]."""
    generator = torch.Generator().manual_seed(n + k)
    q = torch.randint(0, 16, (E, n, k), generator=generator, dtype=torch.uint8)
    exponent = torch.randint(119, 123, (E, n, k // 32), generator=generator, dtype=torch.uint8)
    value = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[q.long() & 7] * torch.where(q > 7, -1, 1)
    words = q[..., 0::2] | q[..., 1::2] << 4
    return (q, words, exponent), value * torch.exp2(exponent.float() - 127).repeat_interleave(32, 2)


def ranks(**changed):
    sizes = dict.fromkeys(("tp_size", "pcp_size", "dp_size", "ep_size", "sp_size"), 1)
    return SimpleNamespace(**sizes | {"use_ep": False, "enable_eplb": False} | changed)


def config(**changed):
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    held = {"moe_backend": "auto", "is_lora_enabled": False, "intermediate_size_per_partition": 2880}
    held |= {"hidden_dim": 2880, "in_dtype": torch.bfloat16, "activation": MoEActivation.SWIGLUOAI}
    return SimpleNamespace(**held | {"moe_parallel_config": ranks(), "max_capture_size": 8} | changed)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(ops, "served", lambda: True)
    monkeypatch.setattr(oracle(), "_user_moe_activation_override", lambda: None)


@pytest.mark.parametrize("at_once", [1, 1 << 27])
def test_floats_are_packed_for_the_kernel(monkeypatch, at_once):
    monkeypatch.setattr(seam, "_AT_ONCE", at_once)  # one expert at a time, or all
    (q, words, exponent), _ = given(*SIZES[0])
    data, scales = seam.pack(words, exponent)
    want = packing.pack_float_experts(q, exponent)
    assert data.shape == (E, 2 * N, 128) and torch.equal(data.flatten(), want.data)
    assert torch.equal(scales, want.scale)
    assert packing.Packed(data, scales, None, 4, 32).shape == (2 * N, 256)


class HummingIndexedExperts:
    pass


def test_a_layer_whose_exponents_the_kernel_does_not_hold_gets_vllms_kernel(monkeypatch, caplog):
    backends, seen = oracle().Mxfp4MoeBackend, []
    convert = seam._packed(lambda *given: seen.append(given) or "converted")
    (first, second), method = (given(*size)[0] for size in SIZES), SimpleNamespace(experts_cls=seam.own())
    second[2][2, 5, 1] = 90
    sizes = {"hidden_dim": 2880, "intermediate_size_per_partition": 2880}
    held = SimpleNamespace(quant_method=method, moe_config=config(**sizes))
    loaded = first[1], second[1], first[2], second[2]
    monkeypatch.setattr(oracle(), "select_mxfp4_moe_backend", lambda _: (backends.HUMMING, HummingIndexedExperts))
    assert convert(backends.B12X_MXFP4_BF16, held, *loaded, "b1", "b2") == "converted"
    assert method.experts_cls is HummingIndexedExperts and method.mxfp4_backend is backends.HUMMING
    assert seen[0][:2] == (backends.HUMMING, held) and seen[0][2:8] == (*loaded, "b1", "b2")
    assert "take vLLM's kernel HummingIndexedExperts: an exponent of experts' floats of 4 bits is 90" in caplog.text
    for backend in (backends.MARLIN, None):  # a kernel with other sizes; none

        def select(_, backend=backend):
            if backend is None:
                raise NotImplementedError("no MXFP4 MoE backend")
            return backend, HummingIndexedExperts

        method.experts_cls = seam.own()
        monkeypatch.setattr(oracle(), "select_mxfp4_moe_backend", select)
        with pytest.raises(UnsupportedFeature, match=r"mxfp4.cuda_weights: .* is 90, .*Install .*humming-kernels"):
            convert(backends.B12X_MXFP4_BF16, held, *loaded)
        assert method.experts_cls is seam.own() and len(seen) == 1
    method.moe_kernel = object()  # graphs of the kernel may be captured
    with pytest.raises(UnsupportedFeature, match=r"new weights do not fit .* is 90, .* an engine with the new weights"):
        convert(backends.B12X_MXFP4_BF16, held, *loaded)


def test_gpt_oss_gets_the_kernel_and_keeps_its_sizes(monkeypatch, hopper):
    from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4MoEMethod

    monkeypatch.setattr(seam, "_supported", lambda _: True)
    method = object.__new__(GptOssMxfp4MoEMethod)
    seam._chosen(GptOssMxfp4MoEMethod.__init__)(method, config())
    assert method.experts_cls is seam.own() and method.experts_cls.__name__ == packed_experts.FLOATS
    assert issubclass(seam.own(), packed_products.own()) and method.moe_kernel is None
    sizes = oracle().mxfp4_round_up_hidden_size_and_intermediate_size(method.mxfp4_backend, 2880, 2880)
    assert sizes == (2880, 2880)
    scale, bias = torch.ones(2), torch.zeros(3)
    made = oracle().make_mxfp4_moe_quant_config(method.mxfp4_backend, scale, scale, w1_bias=bias, w2_bias=bias)
    assert made.w1_scale is made.w2_scale is scale and made.w1_bias is made.w2_bias is bias
    assert made.quant_dtype is None and made.w1_zp is None


def test_vllms_method_loads_packed_weights(monkeypatch, hopper):
    from vllm.model_executor.layers.quantization import mxfp4 as module

    monkeypatch.setattr(seam, "_supported", lambda _: True)
    name, made = "convert_gpt_oss_weight_to_mxfp4_moe_kernel_format", []
    monkeypatch.setattr(module, name, seam._packed(getattr(module, name)))
    kernel = SimpleNamespace(fused_experts=SimpleNamespace(process_weights_after_loading=lambda layer: None))
    monkeypatch.setattr(module, "make_mxfp4_moe_kernel", lambda **given: made.append(given) or kernel)
    method, held = object.__new__(module.GptOssMxfp4MoEMethod), torch.nn.Module()
    sizes = {"hidden_dim": K, "intermediate_size_per_partition": N, "w13_num_shards": 2, "has_bias": True}
    seam._chosen(module.GptOssMxfp4MoEMethod.__init__)(method, config(**sizes))
    held.quant_method, held._expert_routing_tables = method, lambda: None
    method.create_weights(held, E, K, N, torch.bfloat16, weight_loader=None)
    wanted = {}
    for part, size in zip(("w13", "w2"), SIZES, strict=True):
        (q, words, exponent), _ = given(*size)
        getattr(held, f"{part}_weight").data.copy_(words)
        getattr(held, f"{part}_weight_scale").data.copy_(exponent)
        getattr(held, f"{part}_bias").data.normal_()
        wanted[part] = packing.pack_float_experts(q, exponent), getattr(held, f"{part}_bias").clone()
    method.process_weights_after_loading(held)
    assert [(each["experts_cls"], each["mxfp4_backend"].name) for each in made] == [(seam.own(), "B12X_MXFP4_BF16")]
    config_of = made[0]["moe_quant_config"]
    for part, scale, bias in (
        ("w13", config_of.w1_scale, config_of.w1_bias),
        ("w2", config_of.w2_scale, config_of.w2_bias),
    ):
        want, added = wanted[part]
        assert torch.equal(getattr(held, f"{part}_weight").flatten(), want.data)
        assert torch.equal(scale, want.scale) and torch.equal(bias, added)


def test_only_weights_in_mxfp4_are_taken():
    from vllm.model_executor.layers.quantization.utils import quant_utils

    takes = seam.own()._supports_quant_scheme
    assert takes(quant_utils.kMxfp4Static, None)
    assert not takes(quant_utils.kMxfp4Static, quant_utils.kMxfp8Dynamic)
    assert not takes(quant_utils.kInt4Static, None) and not takes(quant_utils.kNvfp4Static, None)
    assert packed_products.own()._supports_quant_scheme(quant_utils.kInt4Static, None)


def select_mxfp4_moe_backend(moe):
    """A global of GptOssMxfp4MoEMethod.__init__."""
    return "vLLM's", None


class GptOssMxfp4MoEMethod:
    def __init__(self, moe):
        self.mxfp4_backend, self.experts_cls = select_mxfp4_moe_backend(moe)


def chosen(config):
    method = object.__new__(GptOssMxfp4MoEMethod)
    seam._chosen(GptOssMxfp4MoEMethod.__init__)(method, config)
    return method


@pytest.mark.parametrize(
    "changed",
    [
        {"moe_backend": "humming"},
        {"is_lora_enabled": True},
        {"in_dtype": torch.float16},
        {"hidden_dim": 2872},
        {"intermediate_size_per_partition": 720},
        {"hidden_dim": 720},
        {"activation": "silu"},
        *({"moe_parallel_config": ranks(**{size: 2})} for size in seam._ALONE),
        {"moe_parallel_config": ranks(use_ep=True)},
        {"moe_parallel_config": ranks(enable_eplb=True)},
    ],
)
def test_all_other_layers_keep_what_vllm_takes(monkeypatch, hopper, changed):
    monkeypatch.setattr(seam, "_supported", lambda _: True)
    assert chosen(config()).experts_cls is seam.own()
    assert chosen(config(**changed)).mxfp4_backend == "vLLM's"


def test_what_an_option_or_a_gpu_asks_for_is_kept(monkeypatch, hopper):
    monkeypatch.setattr(seam, "_supported", lambda _: False)
    assert chosen(config()).mxfp4_backend == "vLLM's"
    monkeypatch.setattr(seam, "_supported", lambda _: True)
    with monkeypatch.context() as patch:
        patch.setattr(oracle(), "_user_moe_activation_override", lambda: "mxfp8")
        assert chosen(config()).mxfp4_backend == "vLLM's"
    with monkeypatch.context() as patch:
        patch.setenv("VLLM_HUMMING_INPUT_QUANT_CONFIG", '{"dtype": "float8e4m3"}')
        assert chosen(config()).mxfp4_backend == "vLLM's"
    with monkeypatch.context() as patch:
        patch.setattr(ops, "served", lambda: False)
        assert chosen(config()).mxfp4_backend == "vLLM's"
    assert chosen(config()).experts_cls is seam.own()


def test_weights_of_another_kernel_are_converted_by_vllm():
    seen = []
    convert = seam._packed(lambda *given: seen.append(given))
    convert("HUMMING", SimpleNamespace(quant_method=SimpleNamespace(experts_cls=object)), *range(9))
    assert len(seen[0]) == 11 and seen[0][2:] == tuple(range(9))


def swiglu(gate_up):
    """gpt-oss's clamped activation of neighbouring gates and inputs."""
    gate, up = gate_up[..., ::2].clamp(max=7), gate_up[..., 1::2].clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.fixture
def layer(float_experts):
    """A layer of experts on the kernel, and the weights and biases of its products."""
    dense = {}

    def check(x, data, bias):
        assert data.floats and data.group == 32 and data.zero is None and data.whole is None and bias is not None
        weight = dense[data.data.data_ptr()]
        assert x.shape[1] == weight.shape[2] and data.shape == (weight.shape[1], -(-x.shape[1] // 128) * 128)
        return weight

    float_experts.begin(seam, check)
    held = torch.nn.Module()
    held.quant_method = SimpleNamespace(experts_cls=seam.own())
    (first, w13), (second, w2) = (given(*size) for size in SIZES)
    biases = [torch.randn(E, n).bfloat16() for n, _ in SIZES]
    raw = [torch.nn.Parameter(part, requires_grad=False) for part in (first[1], second[1], first[2], second[2])]
    converted = seam._packed(None)("any", held, *raw, *biases)
    for name, value in zip(("w13_weight", "w2_weight"), converted, strict=False):
        setattr(held, name, torch.nn.Parameter(value, requires_grad=False))
    dense[held.w13_weight.data_ptr()], dense[held.w2_weight.data_ptr()] = w13, w2
    experts = object.__new__(seam.own())
    experts.moe_config = config(hidden_dim=K, intermediate_size_per_partition=N)
    experts.quant_config = oracle().make_mxfp4_moe_quant_config(
        oracle().Mxfp4MoeBackend.B12X_MXFP4_BF16, *converted[2:4], w1_bias=converted[4], w2_bias=converted[5]
    )
    float_experts.end(held, experts, swiglu)
    return held, (w13, w2, *biases)


def run(held, x, weights, ids):
    output, spaces = torch.empty_like(x), torch.full((2, len(x) * TOP * 2 * N + 1), float("nan")).bfloat16()
    experts = held.quant_method.moe_kernel.fused_experts
    experts.apply(
        output, x, held.w13_weight, held.w2_weight, weights, ids, config().activation, E, None, None, None,
        spaces[0], spaces[1], None, False,
    )  # fmt: skip
    return output


def test_a_layer_is_two_products_around_the_activation(layer):
    held, (w13, w2, bias13, bias2) = layer
    x = torch.randn(9, K).bfloat16()
    weights, ids = torch.rand(9, E).softmax(-1).topk(TOP, -1)
    want = torch.zeros(x.shape)
    for token in range(9):
        for expert, score in zip(ids[token].tolist(), weights[token], strict=True):
            up = (x[token].float() @ w13[expert].T + bias13[expert].float()).bfloat16().float()
            down = swiglu(up).bfloat16().float() @ w2[expert].T + bias2[expert].float()
            want[token] += (down * score).bfloat16()
    assert (run(held, x, weights, ids.int()).float() - want).norm() < 4e-3 * want.norm()


def test_each_product_has_a_problem_and_needs_its_certificate(layer):
    held, _ = layer
    first, second = packed_products.problems(torch.nn.ModuleList([held, torch.nn.Linear(2, 2)]))
    assert first == ops.Problem(2 * N, K, torch.bfloat16, True, 32, False, True)
    assert str(second) == f"experts N={K} K={N} e2m1 groups of 32 bfloat16 bias"
    x, weights, ids = torch.randn(2, K).bfloat16(), torch.ones(2, TOP), torch.tensor([[0, 1], [2, 3]]).int()
    with pytest.raises(CertificateFailed, match="torch.float16 and scales of torch.uint8"):
        run(held, x.half(), weights, ids)
    ops._able.clear()
    with pytest.raises(CertificateFailed, match="cuda.packed_products: experts N=192 K=160 e2m1 .*no certificate"):
        run(held, x, weights, ids)


def test_the_layer_has_a_row_check(layer):
    held, _ = layer
    assert packed_experts.covers(held) and packed_experts.OWNED[packed_experts.FLOATS] == seam.SEAMS[0].name
