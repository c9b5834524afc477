"""Draft models and heads on disk for a local Llama model, made of the model's own weights: some drafts are right.

`draft_model`: the model without its last layer. `eagle`: a head that gets the token's embedding, scaled to the size
that the first layer's norm would give it, and has the model's layers, whose outputs are scaled, too. `eagle3`: a head
whose layers are the model's; its first layer reads the embedding and hardly reads the model's hidden states.
`add_heads` gives a model a head of its own (MTP).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from bi_patch.errors import BiPatchError

METHODS = ("draft_model", "eagle", "eagle3")
_KEPT = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class NoDrafts(BiPatchError):
    """No draft model or head can be made for this kind of model."""


def serves(model: str | Path) -> bool:
    """Whether drafts can be made for a model: a folder with unquantized weights of a Llama model with an own head."""
    folder = Path(model)
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        return False
    config = json.loads((folder / "config.json").read_text())
    plain = not config.get("tie_word_embeddings") and not config.get("quantization_config")
    return config.get("model_type") == "llama" and plain


def write(method: str, model: str | Path, folder: Path) -> Path:
    """Write what `method` of vLLM's speculative_config needs into `folder`, and return the folder.

    model: a folder with config.json and model.safetensors of a Llama model with an own head. Raises NoDrafts.
    """
    import torch
    from safetensors.torch import load_file, save_file

    model = Path(model)
    if method not in METHODS:
        raise NoDrafts(f"drafts are made for {', '.join(METHODS)}, not for {method!r}")
    if not serves(model):
        raise NoDrafts("drafts are made for unquantized weights of Llama models whose head is not tied")
    config = json.loads((model / "config.json").read_text())
    held = load_file(model / "model.safetensors")
    made = {"draft_model": _shorter, "eagle": _eagle, "eagle3": _eagle3}[method](config, held, torch)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, changes = made
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    for name in _KEPT:
        if (model / name).exists():
            shutil.copy(model / name, folder / name)
    return folder


def add_heads(folder: Path) -> None:
    """Make the Qwen2 model of one layer in `folder` a MiMo model with a head (MTP), whose layer is the model's.

    The head reads the token's embedding, divided by its size, and hardly reads the model's hidden states. What its
    layer adds is scaled as much, so that most drafts are right. Raises NoDrafts for another model.
    """
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "qwen2" or config["num_hidden_layers"] != 1 or config.get("tie_word_embeddings"):
        raise NoDrafts("a head (MTP) is made for Qwen2 models of one layer whose head is not tied")
    held = load_file(folder / "model.safetensors")
    size, kind = config["hidden_size"], held["lm_head.weight"].dtype
    scale = float(held["model.embed_tokens.weight"].float().square().mean().rsqrt())
    own = _scaled({name.removeprefix("layers.0."): tensor for name, tensor in _layers(held).items()}, scale)
    own["token_layernorm.weight"] = own["hidden_layernorm.weight"] = torch.ones(size, dtype=kind)
    own["input_proj.weight"] = torch.cat([torch.eye(size) * 1e-3, torch.eye(size)], dim=1).to(kind)
    own["final_layernorm.weight"] = held["model.norm.weight"]
    held |= {f"model.mtp_layers.0.{name}": tensor.clone() for name, tensor in own.items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    changes = {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def _scaled(tensors: dict, scale: float) -> dict:
    """The tensors of layers, which add `scale` times as much to their residual."""
    added = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    return {name: (t.float() * scale).to(t.dtype) if name.endswith(added) else t for name, t in tensors.items()}


def _shorter(config, held, torch):
    last = config["num_hidden_layers"] - 1
    tensors = {name: t for name, t in held.items() if not name.startswith(f"model.layers.{last}.")}
    return tensors, {"num_hidden_layers": last}


def _eagle(config, held, torch):
    embedded = held["model.embed_tokens.weight"].float()
    size = config["hidden_size"]
    scale = float(embedded.square().mean().rsqrt())
    fc = torch.cat([torch.eye(size) * scale, torch.eye(size) * 1e-3], dim=1)
    # The head's residual is `scale` times the model's if each layer adds `scale` times as much. The norms divide by it.
    layers = _scaled(_layers(held), scale)
    # A head has no norm before its first layer: the next products have its weights.
    first = layers.pop("layers.0.input_layernorm.weight").float()
    for part in ("q_proj", "k_proj", "v_proj"):
        name = f"layers.0.self_attn.{part}.weight"
        layers[name] = (layers[name].float() * first).to(layers[name].dtype)
    tensors = {"fc.weight": fc.to(held["lm_head.weight"].dtype), **layers}
    return tensors, {"architectures": ["LlamaForCausalLM"]}


def _eagle3(config, held, torch):
    size, kind = config["hidden_size"], held["lm_head.weight"].dtype
    tensors = _layers(held)
    for part in ("q_proj", "k_proj", "v_proj"):
        name = f"layers.0.self_attn.{part}.weight"
        own = tensors[name]
        tensors[name] = torch.cat([own, own * 1e-2], dim=1)  # of the embedding, and of the model's hidden states
    for i in range(config["num_hidden_layers"]):
        tensors[f"layers.{i}.hidden_norm.weight"] = torch.ones(size, dtype=kind)
    tensors["fc.weight"] = torch.cat([torch.eye(size) * 1e-3] * 3, dim=1).to(kind)
    tensors["norm.weight"] = held["model.norm.weight"]
    tensors["lm_head.weight"] = held["lm_head.weight"]
    return tensors, {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": config["vocab_size"]}


def _layers(held) -> dict:
    """The model's layers, named as in a head's checkpoint."""
    before = "model."
    return {name.removeprefix(before): t for name, t in held.items() if name.startswith("model.layers.")}
