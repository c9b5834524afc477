"""Kimi Linear on CUDA: what its layers' kernels get of a step, and what is refused by name."""

from types import SimpleNamespace

import pytest
import torch

from bi_patch.errors import UnsupportedFeature
from bi_patch.kernels.triton import heads as products
from bi_patch.ops.cuda import causal_conv, kda
from bi_patch.ops.cuda import recurrent as ops
from bi_patch.seams import active, models, packages
from bi_patch.seams.cuda import kimi, mla

pytest.importorskip("vllm")
HEADS, SIZE = 2, 128


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def context(monkeypatch):
    """What vLLM's layers read of a step."""
    from vllm import forward_context

    held = SimpleNamespace(attn_metadata=None, slot_mapping={"layer": torch.arange(9)})
    monkeypatch.setattr(forward_context, "get_forward_context", lambda: held)
    return held


def test_a_step_of_delta_attention_runs_the_bundled_kernels(monkeypatch, context):
    convolved, ran = [], []

    def convolve(x, *given, gated):
        convolved.append((x, *given, gated))
        return 2 * x

    def recur(out, *given):
        ran.append(given)
        out.fill_(3)

    monkeypatch.setattr(causal_conv, "run", convolve)
    monkeypatch.setattr(kda, "run", recur)
    monkeypatch.setattr(ops, "gated_rms_norm", lambda x, gate, weight, eps, sigmoid: x + gate + weight + eps + sigmoid)
    layer = SimpleNamespace(
        prefix="layer",
        conv1d=SimpleNamespace(weight=torch.zeros(3 * HEADS * SIZE, 1, 4), bias=None),
        kv_cache=("conv", "states"),
        A_log="rate",
        dt_bias="bias",
        o_norm=SimpleNamespace(weight=SimpleNamespace(data=torch.tensor(10.0)), eps=5),
    )
    forward = kimi._delta(None)
    tensors = {
        "mixed_qkv": torch.ones(9, 3 * HEADS * SIZE + 4)[:, 4:],
        "g1": torch.zeros(1, 9, HEADS, SIZE),
        "g2": torch.full((9, HEADS, SIZE), 20.0),
        "beta": torch.zeros(1, 9, HEADS),
    }
    out = torch.full((1, 9, HEADS, SIZE), torch.nan)
    forward(layer, **tensors, core_attn_out=out)
    assert not out.any() and not ran  # vLLM profiles
    meta = SimpleNamespace(
        num_prefills=1,
        num_actual_tokens=7,
        non_spec_state_indices_tensor=ints(5, 3),
        non_spec_query_start_loc=ints(0, 1, 7),
        has_initial_state=torch.tensor([True, False]),
    )
    context.attn_metadata, out = {"layer": meta}, torch.full((1, 9, HEADS, SIZE), torch.nan)
    forward(layer, **tensors, core_attn_out=out)
    x, weight, bias, conv, spans, gated = convolved[0]
    assert len(x) == 7 and weight.shape == (768, 4) and (bias, conv, gated) == (None, "conv", False)
    y, gate, beta, rate, dt_bias, states, again = ran[0]
    assert y.eq(2).all() and gate.shape == (7, 256) and beta.shape == (7, 2) and again is spans
    assert (rate, dt_bias, states) == ("rate", "bias", "states")
    assert spans.slots.tolist() == [5, 3] and spans.starts.tolist() == [0, 1, 7] and spans.fresh.tolist() == [0, 1]
    assert out[0, :7].eq(3 + 20 + 10 + 5 + 1).all() and not out[0, 7:].any()


DELTA = {
    "gate_lower_bound": None,
    "num_spec": 0,
    "head_dim": 128,
    "conv_size": 4,
    "local_num_heads": 2,
    "states": (torch.bfloat16, torch.float32),
    "mode": "align",
    "gate": "sigmoid",
    "failed": "",
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"gate_lower_bound": -5.0}, "decays of at least -5.0"),
        ({"num_spec": 2}, "drafts"),
        ({"head_dim": 64}, "heads of 64 elements"),
        ({"conv_size": 3}, "over 3 tokens"),
        ({"gate": "silu"}, "another gate"),
        ({"local_num_heads": 3}, "3 heads; an even number works"),
        ({"states": (torch.bfloat16, torch.bfloat16)}, "--mamba-ssm-cache-dtype float32"),
        ({"mode": "all"}, "--mamba-cache-mode align"),
        ({"failed": "no NVRTC"}, "did not compile: no NVRTC"),
    ],
)
def test_layers_that_the_kernels_do_not_compute_are_refused(monkeypatch, changed, said):
    prepared = []

    def layer(held):
        monkeypatch.setattr(causal_conv, "prepare", lambda *given, gated, floats: prepared.append((*given, floats)))
        monkeypatch.setattr(kda, "prepare", lambda heads: held["failed"])
        return SimpleNamespace(
            prefix="model.layers.0",
            conv1d=SimpleNamespace(weight=torch.zeros(768, 1, 4)),
            o_norm=SimpleNamespace(activation=held["gate"], weight=torch.zeros(128)),
            cache_config=SimpleNamespace(mamba_cache_mode=held["mode"]),
            get_state_dtype=lambda: held["states"],
            **held,
        )

    seam = next(seam for seam in kimi.SEAMS if seam.name == "kimi.cuda_states")
    get_state_shape = seam.close(lambda _: "shape")
    assert get_state_shape(layer(DELTA)) == "shape" and prepared == [(768, 4, True)]
    with pytest.raises(UnsupportedFeature, match=f"recurrent.cuda_states: .*{said}"):
        get_state_shape(layer(DELTA | changed))


class Latent(SimpleNamespace):
    """An MLA layer of Kimi Linear, whose kernels note what they get."""

    def __init__(self, **changes):
        self.cached = []
        impl = SimpleNamespace(
            do_kv_cache_update=lambda *given: self.cached.append(given),
            forward_mqa=lambda q, cache, meta, layer: (q[0] + q[1].sum(-1, keepdim=True), None),
        )
        held = {
            "layer_name": "layer",
            "impl": impl,
            "kv_cache": "cache",
            "kv_cache_dtype": "auto",
            "_k_scale": "scale",
            "attn_backend": SimpleNamespace(get_name=lambda: "FLASH_ATTN_MLA"),
            "non_causal_multi_token_decode": False,
            "rotary_emb": None,
            "q_lora_rank": None,
            "use_output_gate": False,
            "dcp_world_size": 1,
            "num_heads": HEADS,
            "num_local_heads": HEADS,
            "gemm_rs_ar": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "W_UK_T": "key",
            "W_UV": "value",
        }
        super().__init__(**(held | changes))


def rows(tokens):
    out = torch.full((tokens, HEADS * 128), torch.nan)
    return torch.ones(tokens, HEADS, 192), torch.zeros(tokens, 512), torch.zeros(tokens, 1, 64), out


def test_mla_caches_its_latents_and_attends_in_two_forms(monkeypatch, context):
    layer, given = Latent(), []
    monkeypatch.setattr(active, "mla", "two")
    monkeypatch.setattr(mla, "attend", lambda *args: given.append(args))
    attend, (q, latents, rotary, out) = kimi._latent(None), rows(9)
    attend(layer, None, q, latents, rotary, out)
    assert not out.any() and not given and not layer.cached  # vLLM profiles
    context.attn_metadata = {"layer": SimpleNamespace(num_actual_tokens=7)}
    out.fill_(5)
    attend(layer, None, q, latents, rotary, out)
    assert [len(part) for part in given[0][1:4]] == [7, 7, 7] and given[0][4] == "cache" and given[0][0] is layer
    assert len(given[0][6]) == 7 and not out[7:].any() and out[:7].eq(5).all()
    low, turned, cache, slots, kind, scale = layer.cached[0]
    assert (len(low), len(turned), cache, kind, scale) == (7, 7, "cache", "auto", "scale")
    assert slots.tolist() == list(range(7))


def test_in_one_form_every_row_is_absorbed(monkeypatch, context):
    layer = Latent()
    monkeypatch.setattr(active, "mla", "one")
    monkeypatch.setattr(products, "product", lambda a, weight, out: out.fill_(1 if weight == "key" else a.max()))
    attend, (q, latents, rotary, out) = kimi._latent(None), rows(5)
    context.attn_metadata = {"layer": SimpleNamespace(num_actual_tokens=5, num_decode_tokens=5)}
    attend(layer, None, q, latents, rotary, out)
    assert out.eq(1 + 64).all() and layer.cached
    context.attn_metadata["layer"].num_decode_tokens = 4
    with pytest.raises(UnsupportedFeature, match="1 rows are not in the absorbed form"):
        attend(layer, None, q, latents, rotary, out)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"attn_backend": SimpleNamespace(get_name=lambda: "FLASHMLA")}, "the FLASHMLA backend"),
        ({"kv_cache_dtype": "fp8"}, "a fp8 KV cache"),
        ({"rotary_emb": object()}, "rotated queries"),
        ({"q_lora_rank": 1536}, "low-rank queries"),
        ({"use_output_gate": True}, "an output gate"),
        ({"dcp_world_size": 2}, "context parallelism"),
        ({"num_local_heads": 1}, "several ranks"),
        ({"kv_lora_rank": 256}, "latents of 256"),
    ],
)
def test_options_of_mla_without_a_certificate_are_refused(changed, said):
    init = kimi._latent_init(lambda self: None)
    init(Latent())
    with pytest.raises(UnsupportedFeature, match=f"kimi.cuda_mla: .*{said}"):
        init(Latent(**changed))


def config(model=(), text=(), **changes):
    text = {"hidden_act": "silu", "linear_attn_config": {"num_heads": 2}} | dict(text)
    model = {"architectures": ["KimiLinearForCausalLM"], "quantization": None} | dict(model)
    held = {"additional_config": {}, "speculative_config": None, "parallel_config": ranks(1, 1)} | changes
    return SimpleNamespace(model_config=SimpleNamespace(hf_text_config=SimpleNamespace(**text), **model), **held)


def ranks(world, data):
    return SimpleNamespace(world_size=world, data_parallel_size=data)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"text": {"linear_attn_config": {"use_full_rank_gate": True}}}, "a gate of full rank"),
        ({"text": {"attn_res_block_size": 4}}, "attention over residuals"),
        ({"text": {"routed_expert_hidden_size": 512}}, "latent experts"),
        ({"text": {"hidden_act": "situ"}}, "the activation situ"),
        ({"model": {"quantization": "fp8"}}, "the weights' scheme fp8"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"parallel_config": ranks(2, 1)}, "more than one rank"),
        ({"parallel_config": ranks(1, 2)}, "more than one rank"),
        ({"additional_config": {"decode_backend": "latency_specialized"}}, "the specialized decode"),
    ],
)
def test_what_nobody_has_compared_is_refused(changed, said):
    (policy,) = kimi.POLICIES
    policy.apply(config())
    policy.apply(config(model={"architectures": ["LlamaForCausalLM"]}, text={"hidden_act": "gelu"}))
    with pytest.raises(UnsupportedFeature, match=f"kimi.cuda: .*{said}"):
        policy.apply(config(**changed))


def test_kernels_for_few_rows_are_turned_off():
    assert kimi._few_rows(None)(torch.nn.Linear(2, 2), torch.bfloat16) is None
    assert kimi._no_ranks(None)(None, False) is False


def test_the_package_is_covered_for_one_model_and_platform():
    module = "vllm.models.kimi_k3"
    assert not packages.reason(module, "KimiLinearForCausalLM", "cuda")
    for name, platform in (("KimiLinearForCausalLM", "cpu"), ("KimiK3ForConditionalGeneration", "cuda"), ("", "")):
        assert packages.reason(module, name, platform) == packages.PACKAGES["kimi_k3"]
    for platform in ("cuda", "cpu"):
        (policy,) = (p for p in models.policies(platform) if p.name == f"models.{platform}")
        if platform == "cuda":
            policy.apply(config())
        else:
            with pytest.raises(UnsupportedFeature, match="KimiLinearForCausalLM"):
                policy.apply(config())
