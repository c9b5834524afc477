"""Writes a model's folder with other weights: the same files, names, shapes and dtypes, and seeded random values."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")


def write(model: str, seed: int, folder: Path, *, tied: bool = False) -> Path:
    """Write the model with weights of this seed into `folder`, and return the folder.

    model: a local folder. tied: the written model's head is its embedding. With safetensors, each tensor keeps its mean
    and its spread. Without weights, transformers names the tensors: matrices are normal(0, fan_in ** -0.5), norms
    normal(1, 0.1), biases normal(0, 0.5).
    Raises FileNotFoundError if `model` is no local folder.
    """
    from safetensors.torch import save_file

    source = Path(model).expanduser()
    if not source.is_dir():
        raise FileNotFoundError(f"{model} is no local folder")
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix not in _WEIGHTS and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    if tied:
        config = json.loads((source / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}, indent=1))
    left_out = {"lm_head.weight"} if tied else set()
    held = sorted(source.glob("*.safetensors"))
    for file in held:
        made = {name: tensor for name, tensor in _like(file, seed) if name not in left_out}
        save_file(made, folder / file.name, {"format": "pt"})
    if held:
        for index in source.glob("*.safetensors.index.json"):
            shutil.copyfile(index, folder / index.name)
    else:
        made = {name: tensor for name, tensor in _made(folder, seed) if name not in left_out}
        save_file(made, folder / "model.safetensors", {"format": "pt"})
    return folder


def _like(file: Path, seed: int) -> Iterator[tuple[str, object]]:
    """Tensors with the names, shapes, dtypes, means and spreads of a file's. Rows of quantized weights change their
    order, scales stay positive, and other integers stay."""
    import torch
    from safetensors import safe_open

    with safe_open(file, "pt") as held:
        for name in held.keys():  # noqa: SIM118  the file is no dict
            tensor = held.get_tensor(name)
            if tensor.is_floating_point() and tensor.numel() > 1:
                wide = tensor.float()
                noise = torch.randn(tensor.shape, generator=_generator(name, seed))
                if name.endswith(("scale", "scales", "scale_inv")):
                    tensor = (wide * (1 + 0.1 * noise).clamp(0.5, 1.5)).to(tensor.dtype)
                else:
                    tensor = (wide.mean() + wide.std().clamp_min(0.02) * noise).to(tensor.dtype)
            elif name.endswith(("weight", "weight_packed")) and tensor.ndim == 2:
                tensor = tensor[torch.randperm(tensor.shape[0], generator=_generator(name, seed))].contiguous()
            yield name, tensor


def _made(source: Path, seed: int) -> Iterator[tuple[str, object]]:
    """Tensors for a folder that holds config.json only."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.core_model_loading import revert_weight_conversion

    config = AutoConfig.from_pretrained(source)
    with torch.device("meta"):
        kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
        model = kind.from_config(config)
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    held = {}
    saved = model.state_dict()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]  # biases of routers
    for name, parameter in (*model.named_parameters(), *buffers):
        noise = torch.randn(parameter.shape, generator=_generator(name, seed))
        if parameter.ndim >= 2:
            noise *= parameter.shape[-1] ** -0.5
        elif name.endswith("bias"):
            noise *= 0.5
        else:
            noise = 1 + 0.1 * noise
        held[name] = noise.to(dtype)
    # transformers holds experts together, and checkpoints hold them apart
    for name, tensor in revert_weight_conversion(model, held).items():
        yield _published(name, config), tensor.contiguous()


_TOWER, _WHOLE = "vision_tower.", "vision_tower.vision_model."


def _published(name: str, config) -> str:
    """The name of a tensor in checkpoints. transformers 5 leaves a part of it out for encoders of CLIP and SigLIP."""
    kind = getattr(getattr(config, "vision_config", None), "model_type", "")
    if kind not in ("clip_vision_model", "siglip_vision_model") or _WHOLE in name:
        return name
    return name.replace(_TOWER, _WHOLE, 1)


def _generator(name: str, seed: int):
    import torch

    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
