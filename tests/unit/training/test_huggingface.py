"""Hooks of transformers: every form of a batch gives the same bits, and what has no cover is refused by name."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

from bi_patch import training
from bi_patch.errors import BiPatchError, MissingDependency, UnsupportedFeature, UnsupportedRequest
from bi_patch.ops import bits
from bi_patch.training import devices, huggingface

COVERED = ("Llama", "Qwen3", "Qwen2.5", "Mistral", "Gemma 2", "Gemma 3")


def stock(model, ids, mask):
    """The usual logprobs of a model that is not armed."""
    with torch.no_grad():
        found = model(ids, attention_mask=mask).logits.float().log_softmax(-1)
    return found[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize("family", COVERED)
def test_every_form_of_a_batch_has_the_same_bits(make, ids, family):
    tokens, mask = ids
    model = make(family, sliding_window=9) if family in ("Mistral", "Gemma 2", "Gemma 3") else make(family)
    plain = stock(model, tokens, mask)
    training.arm(model)
    found = training.logprobs(model, tokens, mask)
    real = mask.bool()
    both = real[:, 1:]
    torch.testing.assert_close(found[:, 1:][both], plain[both], rtol=1e-4, atol=1e-4)
    assert not found[:, 0].any() and not found[~real].any()

    counts = mask.sum(1).tolist()
    left, left_mask = (torch.zeros_like(x) for x in ids)
    for row, count in enumerate(counts):
        left[row, 40 - count :], left_mask[row, 40 - count :] = tokens[row, :count], 1
    flat, cumulative = tokens[real], torch.tensor([0, 40, 47, 66])
    positions = torch.cat([torch.arange(count) for count in counts])
    forms = {
        "left": training.logprobs(model, left, left_mask)[left_mask.bool()],
        "alone": torch.cat([training.logprobs(model, tokens[i : i + 1, :n])[0] for i, n in enumerate(counts)]),
        "cumulative": training.logprobs(model, flat, cu_seqlens=cumulative),
        "positions": training.logprobs(model, flat[None], position_ids=positions[None])[0],
    }
    for name, form in forms.items():
        assert not bits.differing(form.detach(), found[real].detach()), name
    logits = model(left, attention_mask=left_mask).logits.detach()
    direct = logits.float().log_softmax(-1)[:, :-1].gather(-1, left[:, 1:, None])[..., 0]
    inside = (left_mask[:, 1:] & left_mask[:, :-1]).bool()
    assert not bits.differing(direct[inside], found[:, 1:][both].detach())

    training.disarm(model)
    assert not bits.differing(stock(model, tokens, mask), plain)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_sum_over_ranks_has_no_negative_zero(make, ranks):
    model = make("Llama")
    model.model.embed_tokens.weight.data[5] = -0.0
    huggingface.arm(model, torch.float32, ranks)
    assert bool(model.model.embed_tokens(torch.tensor([[5]])).signbit().any()) == (ranks == 1)


def test_checkpointing_repeats_the_gradients(make, ids):
    model = training.arm(make("Qwen3", torch.bfloat16)).train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        training.logprobs(model, *ids).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    assert all(not bits.differing(found[0][name], found[1][name]) for name in found[0])


def test_master_weights(make, ids):
    narrow, wide = make("Llama", torch.bfloat16), make("Llama", torch.bfloat16).float()
    wide.model.rotary_emb = make("Llama").model.rotary_emb
    training.arm(narrow)
    training.arm(wide, dtype=torch.bfloat16)
    found = training.logprobs(wide, *ids)
    assert not bits.differing(found.detach(), training.logprobs(narrow, *ids).detach())
    found.sum().backward()
    assert {p.grad.dtype for p in wide.parameters()} == {torch.float32}


def test_other_models_of_the_class_stay_as_they_are(make, ids):
    model, other = make("Llama"), make("Llama")
    before = stock(other, *ids)
    with training.exact(model):
        copied = copy.deepcopy(model)
        assert not bits.differing(stock(other, *ids), before)
        want = training.logprobs(model, *ids).detach()
        with torch.no_grad():
            model.model.embed_tokens.weight.zero_()
        assert not bits.differing(training.logprobs(copied, *ids).detach(), want)  # it has weights of its own
    assert huggingface.armed(model) is None
    with pytest.raises(BiPatchError, match="not armed"):
        training.logprobs(model, *ids)


def test_a_weight_that_changes_behind_autograds_back_counts(make, ids):
    model = training.arm(make("Llama"))
    before = training.logprobs(model, *ids).detach()
    model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    assert bits.differing(training.logprobs(model, *ids).detach(), before)


class Wrapped(torch.nn.Module):
    """A layer of another library around a linear layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x):
        return self.base_layer(x)


def _replace(model):
    model.model.layers[0].mlp.up_proj = Wrapped(model.model.layers[0].mlp.up_proj)


def _hook(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = lambda x: x


def _drop(model):
    model.config.attention_dropout = 0.1


def _drop_rows(model):
    model.model.layers[0].dropout = torch.nn.Dropout(0.1)


def _half(model):
    model.model.norm.half()


def _round(model):
    model.to(torch.bfloat16)


def _quantize(model):
    model.hf_quantizer = object()


def _noise(model):
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output + 0.1)


def _wrap_layer(model):
    own = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *args, **kwargs: own(*args, **kwargs)


def _add(model):
    model.model.layers[0].mlp.adapter = torch.nn.Linear(2, 2)


SCALED = {
    "linear": {"factor": 8.0},
    "llama3": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rotations(make, ids, kind):
    model = make("Llama", rope_parameters={"rope_type": kind, "rope_theta": 5e5, **SCALED[kind]})
    plain = stock(model, *ids)
    training.arm(model)
    both = ids[1][:, 1:].bool()
    torch.testing.assert_close(training.logprobs(model, *ids)[:, 1:][both], plain[both], rtol=1e-4, atol=1e-4)


TABLES = """
import copy, json, sys
import bi_patch_entry
bi_patch_entry.without_arming()
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

with set_current_vllm_config(VllmConfig()):
    for kind, own in json.loads(sys.stdin.read()).items():
        given = {"rope_type": kind, "rope_theta": 5e5, **own}
        config = AutoConfig.for_model("llama", head_dim=64, max_position_embeddings=4096, rope_parameters=given)
        for dtype in (torch.bfloat16, torch.float32):
            cos, sin = LlamaRotaryEmbedding(config)(torch.empty(1, dtype=dtype), torch.arange(4096)[None])
            held = copy.deepcopy(config.rope_parameters)
            theirs = get_rope(64, max_position=4096, is_neox_style=True, rope_parameters=held, dtype=dtype)
            ours = torch.cat((cos[0, :, :32], sin[0, :, :32]), -1)
            assert torch.equal(theirs.cos_sin_cache[:4096].to(dtype), ours), (kind, dtype)
print("equal")
"""


def test_vllm_computes_the_tables_alike():
    environ = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_BATCH")}
    given = json.dumps({"default": {}, **SCALED})
    done = subprocess.run(
        [sys.executable, "-c", TABLES], env=environ, input=given, capture_output=True, text=True, timeout=900
    )
    assert done.stdout.split()[-1:] == ["equal"], done.stderr[-2000:]


@pytest.mark.parametrize(
    "change, named",
    [
        (_replace, "training.leaf: model.layers.0.mlp.up_proj .*Wrapped"),
        (_hook, "training.leaf: .*model.layers.0.mlp.up_proj"),
        (_drop, "training.dropout"),
        (_drop_rows, "training.dropout: model.layers.0.dropout"),
        (_half, "training.dtype: model.norm.weight is torch.float16"),
        (_round, "training.rotation: .*rotary_emb are rounded"),
        (_quantize, "training.quantization"),
        (_noise, "training.hook: model.embed_tokens .*_noise"),
        (_wrap_layer, "training.leaf: .*model.layers.0"),
    ],
)
def test_what_has_no_cover_is_refused_by_name(make, change, named):
    model = make("Llama")
    change(model)
    with pytest.raises(UnsupportedFeature, match=named):
        training.arm(model)
    assert huggingface.armed(model) is None and model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "change, named",
    [
        (_replace, "training.leaf: model.layers.0.mlp.up_proj .*Wrapped.* came after arm"),
        (_hook, "training.leaf: .*model.layers.0.mlp.up_proj after arm"),
        (_noise, "training.hook: model.embed_tokens .*_noise"),
        (_wrap_layer, "training.leaf: .*model.layers.0 after arm"),
        (_add, "training.leaf: .*modules"),
    ],
)
def test_what_changes_after_arming_is_refused_by_name(make, ids, change, named):
    model = training.arm(make("Llama"))
    copied = copy.deepcopy(model)
    change(model)
    for call in (lambda: training.logprobs(model, *ids), lambda: model(ids[0], attention_mask=ids[1])):
        with pytest.raises(UnsupportedFeature, match=named):
            call()
    with pytest.raises(UnsupportedFeature, match=named):
        training.logprobs(torch.compile(model, backend="eager"), *ids)
    training.logprobs(copied, *ids)


def test_hooks_that_change_no_value_stay(make, ids):
    model = training.arm(make("Llama"))
    want = training.logprobs(model, *ids).detach()
    model.enable_input_require_grads()
    assert not bits.differing(training.logprobs(model, *ids).detach(), want)
    assert model(*ids[:1], output_hidden_states=True).hidden_states


class PeftModelForCausalLM(torch.nn.Module):
    """Like a wrapper of PEFT, it shows the configuration of the model inside."""

    def __init__(self, base):
        super().__init__()
        self.base_model = base
        self.config = base.config


def test_a_wrapper_of_another_library_is_refused_by_name(make):
    with pytest.raises(UnsupportedFeature, match="training.model: .*PeftModelForCausalLM is no class"):
        training.arm(PeftModelForCausalLM(make("Llama")))


def test_a_router_with_noise_is_refused(make):
    model = make("Llama")
    model.config.router_jitter_noise = 0.1
    with pytest.raises(UnsupportedFeature, match="router_jitter_noise"):
        training.arm(model)


def test_a_mask_beside_lengths_must_say_the_same_sequences(make, ids):
    tokens, mask = ids
    model = training.arm(make("Llama"))
    packed, ends = tokens[:1], torch.tensor([0, 10, 40])
    one = torch.ones_like(packed)
    with pytest.raises(UnsupportedRequest, match="training.mask: .*cumulative lengths"):
        model(packed, attention_mask=one, cu_seq_lens_q=ends)
    with pytest.raises(UnsupportedRequest, match="training.mask: .*cumulative lengths"):
        training.logprobs(model, packed, attention_mask=one, cu_seqlens=ends)
    whole = torch.tensor([0, 40])
    want = training.logprobs(model, packed).detach()
    assert not bits.differing(training.logprobs(model, packed, one, cu_seqlens=whole).detach(), want)


def test_a_release_whose_hooks_nobody_checked(make, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(MissingDependency, match="4.57.1"):
        training.arm(make("Llama"))


def test_models_and_rotations_without_cover(make):
    with pytest.raises(UnsupportedFeature, match="training.model: GraniteForCausalLM"):
        training.arm(make("Granite"))
    scaled = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(UnsupportedFeature, match="training.rotation: .*'dynamic'"):
        training.arm(make("Llama", rope_parameters=scaled))
    thirds = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
    with pytest.raises(UnsupportedFeature, match="training.rotation: .*power of two"):
        training.arm(make("Llama", rope_parameters=thirds))
    with pytest.raises(UnsupportedFeature, match="training.leaf: .*relu"):
        training.arm(make("Llama", hidden_act="relu"))


def test_calls_without_cover(make, ids):
    tokens, mask = ids
    model = training.arm(make("Llama"))
    with pytest.raises(UnsupportedFeature, match="training.autocast"), torch.autocast("cpu", torch.bfloat16):
        training.logprobs(model, tokens, mask)
    with pytest.raises(UnsupportedFeature, match="training.cache"):
        model.generate(tokens[:, :5], max_new_tokens=2)
    with pytest.raises(UnsupportedFeature, match="training.mask"):
        model(tokens, attention_mask=torch.ones(3, 1, 40, 40))
    holes = mask.clone()
    holes[0, 3] = 0
    for call in (lambda m: model(tokens, attention_mask=m), lambda m: training.logprobs(model, tokens, m)):
        with pytest.raises(UnsupportedRequest, match="training.mask"):
            call(holes)
    with pytest.raises(UnsupportedRequest, match="training.positions"):
        model(tokens.flip(1), attention_mask=mask.flip(1), position_ids=torch.arange(40)[None])
    with pytest.raises(UnsupportedRequest, match="training.layout"):
        training.logprobs(model, tokens[0], cu_seqlens=torch.tensor([0, 20, 50]))
    with pytest.raises(UnsupportedRequest, match="temperature"):
        training.logprobs(model, tokens, mask, temperature=0.0)


def test_sampling_transforms_by_token(make, ids):
    tokens, mask = ids
    model = training.arm(make("Llama"))
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits.float()[:, :-1]
    heat = torch.tensor([[0.5], [1.0], [2.0]])
    found = training.logprobs(model, tokens, mask, temperature=heat, top_k=256)
    want = (logits / heat[..., None]).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    both = mask[:, 1:].bool()
    assert not bits.differing(found[:, 1:][both].detach(), want[both])
    cut = training.logprobs(model, tokens, mask, top_k=3)
    kept = logits >= logits.topk(3).values[..., -1:]
    assert torch.equal(cut[:, 1:][both].isinf(), ~kept.gather(-1, tokens[:, 1:, None])[..., 0][both])


def test_heads_that_cuda_does_not_cover_are_refused_while_arming(make, monkeypatch):
    model = make("Llama", head_dim=48)
    monkeypatch.setattr(devices.implementation("cpu"), "cover", devices.implementation("cuda").cover)
    with pytest.raises(UnsupportedFeature, match="training.rotation: .*48"):
        training.arm(model)
    assert huggingface.armed(model) is None
