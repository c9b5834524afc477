"""The axis "LoRA": makes random adapters and compares requests with an adapter, beside requests without."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bi_patch.tools.verify.case import Case
from bi_patch.tools.verify.engine import Engine, Options
from bi_patch.tools.verify.probes.base import NotExercised, Run, config

RANK = 8
_LEAST = 8  # concurrent requests: every level has a batch of this size or more, with room beside its subjects
_KINDS = ("llama", "mistral", "qwen2", "qwen3")


def missing(engine: Engine) -> str:
    """Why no adapter can be made for the engine's model, "" when an adapter can be made."""
    found = config(engine.options.model)
    if not found:
        return "making an adapter needs the model's config.json, and the model is not a local folder"
    if engine.options.max_num_seqs < _LEAST:
        return f"max_num_seqs is {engine.options.max_num_seqs}: no batch of {_LEAST} requests"
    kind = found.get("model_type")
    return "" if kind in _KINDS else f"verify makes no adapter for models of type {kind!r}"


def options(base: Options) -> dict[str, object]:
    return {"extra": {**base.extra, "enable_lora": True, "max_lora_rank": RANK, "max_loras": 2}}


def lora(run: Run) -> Iterator[Case]:
    """Each subject with an adapter, among requests with the same adapter, with another, and without."""
    load, model = run.workload, run.engine.options.model
    first, second = adapter(model, 1), adapter(model, 2)
    requests = [run.greedy(i).but(lora=first) for i in run.subjects]
    if run.alone(requests)[0] == run.alone([run.greedy(0)])[0]:
        raise NotExercised("LoRA: the adapter changed nothing")
    for size in (n for n in load.sizes if len(requests) < n <= 40):
        others = [load.filler(i, lora=("", first, second)[i % 3]) for i in range(size - len(requests))]
        batch = [*others[::2], *requests, *others[1::2]]
        start = len(others[::2])
        yield from run.each(
            batch, {start + i: f"{load.label(i)} with an adapter, in a batch of {size}" for i in run.subjects}
        )


@functools.cache
def adapter(model: str, seed: int) -> str:
    """The folder of a random adapter of rank 8 for a local Llama-like model. The folder is deleted at process exit."""
    import torch
    from safetensors.torch import save_file

    held = config(model)
    hidden, heads = held["hidden_size"], held["num_attention_heads"]
    width = held.get("head_dim") or hidden // heads
    inner, keys = held["intermediate_size"], (held.get("num_key_value_heads") or heads) * width
    shapes = {
        "self_attn.q_proj": (hidden, heads * width),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (heads * width, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(held["num_hidden_layers"]):
        for name, (fan_in, fan_out) in shapes.items():
            place = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(RANK, fan_in, generator=generator) * fan_in**-0.5
            tensors[f"{place}.lora_B.weight"] = torch.randn(fan_out, RANK, generator=generator) * RANK**-0.5 * 0.2
    _made.append(tempfile.TemporaryDirectory(prefix="bi_patch-lora-", ignore_cleanup_errors=True))
    folder = Path(_made[-1].name)
    save_file({k: v.to(torch.bfloat16) for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": RANK,
                "lora_alpha": RANK,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": [name.split(".")[1] for name in shapes],
                "base_model_name_or_path": model,
            }
        )
    )
    return str(folder)


_made: list[tempfile.TemporaryDirectory] = []  # removed when the process ends
