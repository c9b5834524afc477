"""Random LoRA adapters on disk, in PEFT's format, for a local model. Their sizes come from the model's config.json."""

from __future__ import annotations

import json
from pathlib import Path

from bi_patch.errors import BiPatchError

# model_type -> the class of vLLM whose linears `shapes` knows. Other classes of the same type name theirs otherwise.
KINDS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# The same for models with images, whose adapters change the language model alone.
IMAGES = {
    "gemma3": "Gemma3ForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}
_EMBEDDED = ("llama", "qwen3", "qwen3_moe")  # vLLM takes adapters of their embeddings and heads
_STRENGTH = 0.2  # of an adapter's output, as a share of its input: enough to change logits, too little to break them
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class NoAdapter(BiPatchError):
    """No adapter can be made for this kind of model."""


def missing(config: dict) -> str:
    """Why no adapter can be made for a model, "" when one can be made. config: config.json."""
    kinds, kind = KINDS | IMAGES, config.get("model_type")
    names = config.get("architectures") or [kinds.get(kind)]
    if kind not in kinds:
        return f"adapters are made for models of type {', '.join(kinds)}, not {kind!r}"
    return "" if kinds[kind] in names else f"no adapter is made for {names[0]}, whose type says {kind!r}"


def shapes(config: dict, experts: bool = False) -> dict[str, tuple[int, int]]:
    """The linear layers of one layer of a model that take an adapter: name -> (inputs, outputs).

    config: config.json. experts: whether routed experts are among them. Raises NoAdapter.
    """
    if why := missing(config):
        raise NoAdapter(why)
    config = config.get("text_config", config)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    keys = (config.get("num_key_value_heads") or heads) * width
    found = {
        "self_attn.q_proj": (hidden, heads * width),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (heads * width, hidden),
    }
    if "num_experts" not in config:
        inner = config["intermediate_size"]
        found |= {f"mlp.{name}": size for name, size in _gated(hidden, inner)}
    elif experts:
        parts = _gated(hidden, config["moe_intermediate_size"])
        found |= {
            f"mlp.experts.{expert}.{name}": size for expert in range(config["num_experts"]) for name, size in parts
        }
    return found


def _gated(hidden: int, inner: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    return ("gate_proj", (hidden, inner)), ("up_proj", (hidden, inner)), ("down_proj", (inner, hidden))


def embeds(config: dict) -> bool:
    """Whether vLLM takes adapters of this model's embeddings and of its head."""
    return config.get("model_type") in _EMBEDDED and not config.get("tie_word_embeddings")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def write(
    model: str | Path,
    folder: Path,
    *,
    seed: int,
    rank: int,
    only: tuple[str, ...] = (),
    embedded: bool = False,
    experts: bool = False,
) -> Path:
    """Write an adapter of a rank into `folder`, and return the folder. The same arguments give the same adapter.

    model: a folder with config.json. only: the last parts of the names of the layers that it changes, () for all linear
    layers. embedded: whether it also changes the embeddings and the head. experts: whether it also changes routed
    experts. Raises NoAdapter.
    """
    import torch
    from safetensors.torch import save_file

    config = json.loads((Path(model).expanduser() / "config.json").read_text())
    wanted = {name: size for name, size in shapes(config, experts).items() if not only or _last(name) in only}
    if embedded and not embeds(config):
        raise NoAdapter("vLLM takes no adapters of this model's embeddings and head")
    generator = torch.Generator().manual_seed(seed)

    def pair(fan_in: int, fan_out: int) -> tuple[torch.Tensor, torch.Tensor]:
        down = torch.randn(rank, fan_in, generator=generator) * fan_in**-0.5
        return down, torch.randn(fan_out, rank, generator=generator) * rank**-0.5 * _STRENGTH

    tensors = {}
    inner = "language_model." if config.get("model_type") in IMAGES else ""
    for layer in range(config.get("text_config", config)["num_hidden_layers"]):
        for name, size in wanted.items():
            place = f"base_model.model.model.{inner}layers.{layer}.{name}"
            tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"] = pair(*size)
    targets = sorted({_last(name) for name in wanted})
    if embedded:
        vocab, hidden = config["vocab_size"], config["hidden_size"]
        place = "base_model.model.model.embed_tokens"
        down = torch.randn(rank, vocab, generator=generator) * 0.05
        tensors[f"{place}.lora_embedding_A"] = down
        tensors[f"{place}.lora_embedding_B"] = torch.randn(hidden, rank, generator=generator) * rank**-0.5
        place = "base_model.model.lm_head"
        tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"] = pair(hidden, vocab)
        targets += ["embed_tokens", "lm_head"]
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.to(torch.bfloat16) for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    given = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "base_model_name_or_path": str(model),
    }
    (folder / "adapter_config.json").write_text(json.dumps(given))
    return folder
