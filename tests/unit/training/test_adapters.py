"""LoRA layers of PEFT in an armed model: the order of the sampler's kernel, gradients, and what is refused by name."""

import pytest
import torch

from bi_patch import training
from bi_patch.errors import UnsupportedFeature
from bi_patch.ops import bits
from bi_patch.ops.cpu import lora
from bi_patch.training import devices

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def adapted(make):
    """adapted(dtype, **options of peft.LoraConfig): a Llama with an adapter whose B is not zero."""

    def model(dtype=torch.bfloat16, family="Llama", **given):
        asked = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | given
        torch.manual_seed(1)
        made = peft.get_peft_model(make(family, dtype), peft.LoraConfig(**asked))
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1)
        return made

    return model


def test_a_layer_has_the_bits_of_the_samplers_kernel(adapted):
    model = training.arm(adapted())
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    want = layer.base_layer(x).detach().clone()
    held = b.detach().bfloat16()
    held *= 1.5  # as vLLM multiplies a loaded adapter
    lora.add(want, x, a.detach().bfloat16()[None, None], held[None, None], torch.zeros(9, dtype=torch.int64))
    assert not bits.differing(layer(x).detach(), want)


def test_an_adapter_serves_until_it_is_switched_off(adapted, make, ids):
    model = adapted(torch.float32)
    with torch.no_grad():
        plain = model(ids[0], attention_mask=ids[1]).logits.log_softmax(-1)[:, :-1]
    plain = plain.gather(-1, ids[0][:, 1:, None])[..., 0]
    training.arm(model)
    found = training.logprobs(model, *ids).detach()
    both = ids[1][:, 1:].bool()
    torch.testing.assert_close(found[:, 1:][both], plain[both], rtol=1e-4, atol=1e-4)
    base = training.logprobs(training.arm(make("Llama")), *ids).detach()
    assert bits.differing(found, base)
    with model.disable_adapter():
        assert not bits.differing(training.logprobs(model, *ids).detach(), base)
    training.disarm(model)
    with torch.no_grad():
        again = model(ids[0], attention_mask=ids[1]).logits.log_softmax(-1)[:, :-1]
    assert not bits.differing(again.gather(-1, ids[0][:, 1:, None])[..., 0], plain)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_gradients_do_not_depend_on_the_cut(adapted, ids, family):
    model = training.arm(adapted(family=family)).train()
    tokens, mask = ids
    found = []
    for cut in (3, 1):
        with training.gradients(model):
            for at in range(0, 3, cut):
                training.logprobs(model, tokens[at : at + cut], mask[at : at + cut]).sum().backward()
        found.append({name: p.main_grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(found[0]) == 2 * 2 * len(TARGETS)
    assert not any(bits.differing(found[0][name], found[1][name]) for name in found[0])
    model.zero_grad()
    training.logprobs(model, *ids).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            error = float((parameter.grad.float() - found[0][name]).norm() / found[0][name].norm())
            assert error < 0.05, name


def _merge(model):
    model.merge_adapter()


def _two(model):
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=TARGETS))
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize(
    "given, change, named",
    [
        ({"use_dora": True}, None, "training.lora: .*DoRA"),
        ({"lora_bias": True}, None, "training.lora: .*a bias"),
        ({"lora_dropout": 0.1}, None, "training.dropout: .*lora_dropout"),
        ({"target_modules": ["lm_head"]}, None, "training.lora: lm_head"),
        ({"target_modules": ["embed_tokens"]}, None, "training.leaf: .*embed_tokens .*Embedding"),
        ({"modules_to_save": ["lm_head"]}, None, "training.leaf: lm_head .*ModulesToSaveWrapper"),
        ({}, _merge, "training.lora: .*is merged"),
        ({}, _two, "training.lora: .*2 adapters"),
    ],
)
def test_what_has_no_cover_is_refused_by_name(adapted, given, change, named):
    model = adapted(**given)
    if change is not None:
        change(model)
    with pytest.raises(UnsupportedFeature, match=named):
        training.arm(model)


@pytest.mark.parametrize("change", [_merge, _two])
def test_what_changes_after_arming_is_refused_by_name(adapted, ids, change):
    model = training.arm(adapted())
    change(model)
    with pytest.raises(UnsupportedFeature, match="training.(lora|leaf)"):
        training.logprobs(model, *ids)


def test_adapters_on_cuda_are_covered_in_bf16():
    pytest.importorskip("triton")
    lora = devices.implementation("cuda", "lora")
    lora.cover(torch.bfloat16)
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(UnsupportedFeature, match=f"training.lora: on CUDA, .*{dtype}"):
            lora.cover(dtype)


def test_other_wrappers_of_peft_are_refused(make):
    asked = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(UnsupportedFeature, match="training.model: .*no class of transformers.models"):
        training.arm(peft.get_peft_model(make("Llama"), asked))


def test_ranks_of_a_sampler_are_refused(adapted):
    with pytest.raises(UnsupportedFeature, match="training.lora: .*ranks"):
        training.huggingface.arm(adapted(), torch.bfloat16, 2)


def test_sync_says_how_an_adapter_is_sent(adapted):
    with pytest.raises(UnsupportedFeature, match="training.lora: .*LoRARequest"):
        training.sync(training.arm(adapted()), "http://nowhere")
