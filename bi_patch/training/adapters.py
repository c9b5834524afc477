"""LoRA layers of PEFT: a linear layer whose adapter is added in the sampler's order.

Covered are plain adapters of the linear layers that `COVERED` names. The rest of PEFT is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bi_patch.errors import UnsupportedFeature

COVERED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HOLDERS = (torch.nn.ModuleDict, torch.nn.ParameterDict)  # in which a layer of PEFT keeps its adapters, by name


def forward(module: torch.nn.Module, name: str) -> Callable:
    """The forward of a layer of PEFT. Raises UnsupportedFeature with its name and the reason if it has no cover."""
    kind, at = f"{type(module).__module__}.{type(module).__qualname__}", name.rpartition(".")[2]
    if kind != "peft.tuners.lora.layer.Linear" or type(module.base_layer) is not torch.nn.Linear:
        raise UnsupportedFeature(
            f"training.leaf: {name} ({kind}) has no cover in the trainer. Use LoRA of PEFT on linear layers"
        )
    if at not in COVERED:
        raise UnsupportedFeature(
            f"training.lora: {name} has an adapter, and the trainer covers adapters of "
            f"{', '.join(COVERED)} only. Leave it out of target_modules"
        )
    for adapter in module.lora_A:
        _check(module, name, adapter)
    active(module, name)
    return linear


def _check(module: torch.nn.Module, name: str, adapter: str) -> None:
    odd = {
        "a variant such as DoRA": adapter in module.lora_variant,
        "a bias": bool(module.lora_B[adapter].bias is not None),
    }
    if any(odd.values()):
        said = ", ".join(what for what, found in odd.items() if found)
        raise UnsupportedFeature(
            f"training.lora: the adapter {adapter} of {name} has {said}, which has no cover. Use plain LoRA"
        )


def active(module: torch.nn.Module, name: str = "a layer") -> str:
    """The one adapter that serves now, or "" if adapters are switched off. Raises UnsupportedFeature for others."""
    if module.merged:
        raise UnsupportedFeature(
            f"training.lora: the adapter of {name} is merged, which rounds the weights. Call unmerge_adapter, or "
            "merge_and_unload and arm the model that remains"
        )
    if module.disable_adapters:
        return ""
    held = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
    if len(held) > 1:
        raise UnsupportedFeature(
            f"training.lora: {name} adds {len(held)} adapters ({', '.join(held)}), and a request has one. Activate one"
        )
    return held[0] if held else ""


def linear(self, x):
    """The forward of a LoRA layer: the linear layer, and the active adapter."""
    y, adapter = self.base_layer(x), active(self)
    if not adapter:
        return y
    pair = self.lora_A[adapter].weight, self.lora_B[adapter].weight
    return self._bi_patch.functions["lora"](y, x, *pair, self.scaling[adapter])


def scaled(b: torch.Tensor, dtype: torch.dtype, scaling: float) -> torch.Tensor:
    """b as vLLM keeps it: rounded to `dtype`, multiplied by the adapter's scaling, and rounded again."""
    held = b.to(dtype)
    return held if scaling == 1 else held * scaling


def has(model: torch.nn.Module) -> bool:
    """Whether a layer of a model has an adapter of PEFT."""
    return any(type(module).__module__.startswith("peft.") for module in model.modules())
