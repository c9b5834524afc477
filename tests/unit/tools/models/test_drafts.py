"""Draft models and heads: the tensors that vLLM's models of drafts load, made of a model's weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bi_patch.tools.models import drafts

HIDDEN, VOCABULARY, LAYERS = 8, 32, 3


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    sizes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (4, HIDDEN),
        "self_attn.v_proj": (4, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "input_layernorm": (HIDDEN,),
    }
    held = {
        f"model.layers.{i}.{name}.weight": torch.randn(*size) for i in range(LAYERS) for name, size in sizes.items()
    }
    for name in ("model.embed_tokens", "lm_head"):
        held[f"{name}.weight"] = torch.randn(VOCABULARY, HIDDEN)
    held["model.norm.weight"] = torch.randn(HIDDEN)
    save_file(held, folder / "model.safetensors")
    config = {"model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_each_method_gets_its_tensors(model, tmp_path):
    made = {}
    for method in drafts.METHODS:
        folder = drafts.write(method, model, tmp_path / method)
        made[method] = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    tensors, config = made["draft_model"]
    assert config["num_hidden_layers"] == LAYERS - 1 and not any(".layers.2." in name for name in tensors)
    tensors, config = made["eagle"]
    assert tensors["fc.weight"].shape == (HIDDEN, 2 * HIDDEN) and "layers.0.input_layernorm.weight" not in tensors
    assert config["architectures"] == ["LlamaForCausalLM"] and "lm_head.weight" not in tensors
    held = load_file(model / "model.safetensors")
    scale = held["model.embed_tokens.weight"].square().mean().rsqrt()
    assert torch.equal(tensors["fc.weight"][:, :HIDDEN], torch.eye(HIDDEN) * scale)
    query = held["model.layers.0.self_attn.q_proj.weight"] * held["model.layers.0.input_layernorm.weight"]
    torch.testing.assert_close(tensors["layers.0.self_attn.q_proj.weight"], query)
    added = tensors["layers.1.self_attn.o_proj.weight"]
    torch.testing.assert_close(added, held["model.layers.1.self_attn.o_proj.weight"] * scale)
    tensors, config = made["eagle3"]
    assert tensors["fc.weight"].shape == (HIDDEN, 3 * HIDDEN) and config["draft_vocab_size"] == VOCABULARY
    assert tensors["layers.0.self_attn.k_proj.weight"].shape == (4, 2 * HIDDEN)
    assert tensors["layers.1.self_attn.k_proj.weight"].shape == (4, HIDDEN)


def test_other_models_have_none(model, tmp_path):
    assert drafts.serves(model) and not drafts.serves(tmp_path)
    with pytest.raises(drafts.NoDrafts, match="not for 'medusa'"):
        drafts.write("medusa", model, tmp_path / "x")
    config = json.loads((model / "config.json").read_text())
    for change in ({"model_type": "qwen3"}, {"tie_word_embeddings": True}, {"quantization_config": {"bits": 4}}):
        (model / "config.json").write_text(json.dumps({**config, **change}))
        assert not drafts.serves(model)
        with pytest.raises(drafts.NoDrafts, match="whose head is not tied"):
            drafts.write("eagle", model, tmp_path / "x")


def test_a_model_of_one_layer_gets_a_head_of_its_own(model):
    """The head's layer is the model's, and its rows are the embedding's divided by their size."""
    config = json.loads((model / "config.json").read_text())
    with pytest.raises(drafts.NoDrafts, match="of one layer"):
        drafts.add_heads(model)
    held = {k: t for k, t in load_file(model / "model.safetensors").items() if ".layers.1." not in k and ".2." not in k}
    save_file(held, model / "model.safetensors")
    changes = {"model_type": "qwen2", "num_hidden_layers": 1}
    (model / "config.json").write_text(json.dumps(config | changes))
    drafts.add_heads(model)
    made, config = load_file(model / "model.safetensors"), json.loads((model / "config.json").read_text())
    assert config["architectures"] == ["MiMoForCausalLM"] and config["num_nextn_predict_layers"] == 1
    head = {name.removeprefix("model.mtp_layers.0."): t for name, t in made.items() if "mtp_layers" in name}
    assert {name: t for name, t in made.items() if "mtp_layers" not in name}.keys() == held.keys()
    scale = held["model.embed_tokens.weight"].square().mean().rsqrt()
    torch.testing.assert_close(head["self_attn.o_proj.weight"], held["model.layers.0.self_attn.o_proj.weight"] * scale)
    assert torch.equal(head["self_attn.q_proj.weight"], held["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(head["input_proj.weight"][:, HIDDEN:], torch.eye(HIDDEN))
    assert torch.equal(head["final_layernorm.weight"], held["model.norm.weight"])
