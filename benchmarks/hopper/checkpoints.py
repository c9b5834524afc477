"""Models of real shapes with random weights, for the scripts beside this file."""

from __future__ import annotations

import json
from pathlib import Path

SEED = 11


def write(name: str, layers: int | None, folder: str) -> tuple[Path, int]:
    """Write a model with random bf16 weights, with a standard deviation of fan_in**-0.5.

    name: of bi_patch/tools/models/families.py or shapes.py. layers: fewer than the model has, or None. Returns (its
    folder, its vocabulary).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from bi_patch.tools.models import families, shapes

    made = Path((families if name in families.FAMILIES else shapes).write(name, folder))
    config = json.loads((made / "config.json").read_text())
    if layers:
        config["num_hidden_layers"] = layers
        (made / "config.json").write_text(json.dumps(config))
    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(made), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(made)
    return made, config["vocab_size"]
