"""Which module of a transformers model gets which forward. A module without cover is refused by name.

Each forward is bound to its module, and finds the armed model's state in the module's attribute `_bi_patch`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bi_patch.errors import UnsupportedFeature
from bi_patch.training import adapters, devices
from bi_patch.training.families import ACTIVATIONS, FAMILIES, ROTATIONS, ROW_PARALLEL, Family

_LAYER = re.compile(r"\blayers\.(\d+)\.")
PARTS = "_bi_patch_parts"  # the attribute of a linear layer: how many ranks of the sampler share its K
# Whose forward hooks leave values as they are: FSDP2, transformers' records of outputs, and bi_patch.
_HOOKS = ("torch.distributed.", "transformers.utils.output_capturing", "bi_patch.")
FREQUENCIES = "_bi_patch_frequencies"  # of a rotary module: its own, by name


def family_of(model: torch.nn.Module) -> Family:
    """The family of a transformers model. Raises UnsupportedFeature for a model without cover."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES or not _own_class(model).__name__.endswith("ForCausalLM"):
        raise UnsupportedFeature(
            f"training.model: {type(model).__name__} ({kind}) is not covered. Use a causal language model of "
            f"transformers of one of these types: {', '.join(FAMILIES)}"
        )
    if getattr(model.config, "attention_dropout", 0):
        raise UnsupportedFeature(
            "training.dropout: the configuration has attention_dropout, and a sampler drops nothing. Set it to 0"
        )
    if getattr(model.config, "router_jitter_noise", 0):
        raise UnsupportedFeature(
            "training.dropout: the configuration has router_jitter_noise, and a sampler's router has no noise. "
            "Set it to 0"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedFeature(
            "training.quantization: a quantized model's layers have no cover in the trainer. Use an unquantized one"
        )
    module_of(model)  # raises for a class of another library
    return FAMILIES[kind]


@dataclass(frozen=True)
class Planned:
    """A module, its name, the forward that it gets (None: its own is exact), and how many ranks share its K."""

    name: str
    module: torch.nn.Module
    forward: Callable | None
    parts: int


def plan(model: torch.nn.Module, family: Family, dtype: torch.dtype, parts: int) -> list[Planned]:
    """What each module gets. parts: the sampler's ranks. Raises UnsupportedFeature with the module's name."""
    devices.implementation(next(model.parameters()).device.type).cover(head_size(model.config), family.experts)
    found = []
    for name, module in model.named_modules():
        forward = _forward(module, name, family, model)
        if module is not model and "forward" in vars(module):
            raise UnsupportedFeature(f"training.leaf: something else replaced the forward of {name}. Remove it first")
        if module not in (model, model.base_model):
            _check_hooks(name, module)
        _check_parameters(name, module, dtype)
        if forward is adapters.linear:
            devices.implementation(module.weight.device.type, "lora").cover(dtype)
            if parts > 1:
                raise UnsupportedFeature(
                    f"training.lora: {name} has an adapter, and the sampler's ranks share its K. Start a sampler "
                    "without tensor parallelism"
                )
        module_parts = parts if name.rpartition(".")[2] in ROW_PARALLEL else 1
        if module_parts > 1 and module.weight.shape[1] % parts:
            raise UnsupportedFeature(
                f"training.parallel: {parts} ranks cannot share the input of {name} equally. Start a sampler with "
                "another number of ranks"
            )
        found.append(Planned(name, module, None if forward is _OWN else forward, module_parts))
    return found


def check_unchanged(model: torch.nn.Module, planned: list[Planned]) -> None:
    """Raise UnsupportedFeature with a module's name if the modules of an armed model are not what was armed."""
    held = list(model.named_modules())
    for (name, module), known in zip(held, planned):
        if module is not known.module:
            raise UnsupportedFeature(
                f"training.leaf: {name} ({type(module).__module__}.{type(module).__qualname__}) came after arm. Arm "
                "the model again"
            )
        if module in (model, model.base_model):
            continue  # a trainer may wrap the model itself, and arming's own hook is there
        own = vars(module).get("forward")
        if getattr(own, "__func__", own) is not known.forward:
            raise UnsupportedFeature(f"training.leaf: something replaced the forward of {name} after arm. Remove it")
        _check_hooks(name, module)
    if len(held) != len(planned):
        raise UnsupportedFeature(
            f"training.leaf: the model has {len(held)} modules, and {len(planned)} were armed. Arm the model again"
        )


def _check_hooks(name: str, module: torch.nn.Module) -> None:
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        source = getattr(hook, "__module__", None) or type(hook).__module__
        called = getattr(hook, "__qualname__", type(hook).__qualname__)
        if not source.startswith(_HOOKS) and not called.endswith(".make_inputs_require_grads"):
            raise UnsupportedFeature(
                f"training.hook: {name} has a forward hook of {source}.{called} (NEFTune and others change values so). "
                "Remove it"
            )


def _check_parameters(name: str, module: torch.nn.Module, dtype: torch.dtype) -> None:
    for own, parameter in module.named_parameters(recurse=False):
        if parameter.dtype not in (dtype, torch.float32):
            raise UnsupportedFeature(
                f"training.dtype: {name}.{own} is {parameter.dtype}, and the sampler computes in {dtype}. Use {dtype}, "
                "or float32 for master weights"
            )


def _forward(module: torch.nn.Module, name: str, family: Family, model: torch.nn.Module) -> Callable:
    """The forward for one module. Raises UnsupportedFeature with the module's name and class if it has no cover."""
    own, prefix = _own_class(module), family.prefix
    kind = own.__name__
    if own.__module__.startswith("peft."):
        return adapters.forward(module, name)
    if own is torch.nn.Linear:
        return _head if module is model.get_output_embeddings() else _linear
    if own is torch.nn.Embedding or kind == f"{prefix}TextScaledWordEmbedding":
        if module.max_norm is not None:
            raise UnsupportedFeature(f"training.leaf: {name} has max_norm, which changes weights. Set it to None")
        return _embedding
    if kind == f"{prefix}RMSNorm":
        of_heads = name.endswith((".q_norm", ".k_norm"))
        return _head_norm if family.fused and of_heads else _turned_norm if family.turned and of_heads else _norm
    if kind == f"{prefix}MLP":
        _check_activation(name, module)
        return _mlp
    if family.experts and kind == f"{prefix}TopKRouter":
        return _router
    if family.experts and kind == f"{prefix}Experts":
        _check_activation(name, module)
        return _experts
    if kind == f"{prefix}RotaryEmbedding":
        _check_rotation(name, module)
        return _rotary
    if isinstance(module, torch.nn.Dropout) and module.p:
        raise UnsupportedFeature(f"training.dropout: {name} drops a share of {module.p}. Set it to 0")
    if isinstance(module, (torch.nn.Dropout, torch.nn.Identity, torch.nn.ModuleList, *adapters.HOLDERS)):
        return _OWN
    if any(base.__module__ == module_of(model) for base in type(module).__mro__) and list(module.children()):
        return _OWN
    if name.endswith(".act_fn"):
        return _OWN  # the MLP's forward does not call it
    raise UnsupportedFeature(
        f"training.leaf: {name} ({type(module).__module__}.{type(module).__qualname__}) has no cover in the trainer. "
        "Use a model without it"
    )


def _own_class(module: torch.nn.Module) -> type:
    """The class of a module. FSDP2 puts a class of its own before it."""
    own = type(module)
    return own.__bases__[-1] if own.__name__ == f"FSDP{own.__bases__[-1].__name__}" else own


def module_of(model: torch.nn.Module) -> str:
    """The module of transformers that defines the model's class."""
    found = [base.__module__ for base in type(model).__mro__ if base.__module__.startswith("transformers.models.")]
    if not found:
        raise UnsupportedFeature(
            f"training.model: {type(model).__module__}.{type(model).__qualname__} is no class of transformers.models, "
            "but code or a wrapper (PEFT) of its own. Arm the model inside"
        )
    return found[0]


def _activation(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or config.hidden_act


def _check_activation(name: str, module: torch.nn.Module) -> None:
    if _activation(module.config) not in ACTIVATIONS:
        raise UnsupportedFeature(
            f"training.leaf: {name} has the activation {_activation(module.config)}, and the trainer has "
            f"{', '.join(ACTIVATIONS)} only. Use another model"
        )


def _check_rotation(name: str, module: torch.nn.Module) -> None:
    for layers, kind in _rotations(module):
        if kind not in ROTATIONS:
            raise UnsupportedFeature(
                f"training.rotation: {name} has the rotation {kind!r}. The tables of other rotations than "
                f"{', '.join(ROTATIONS)} may differ between transformers and vLLM. Use another model"
            )
        parameters = module.config.rope_parameters[layers] if layers else module.config.rope_parameters
        if kind == "linear" and math.frexp(parameters["factor"])[0] != 0.5:
            raise UnsupportedFeature(
                f"training.rotation: {name} divides by {parameters['factor']}, and the tables of transformers and vLLM "
                "are equal only for a power of two. Use another model"
            )
        at = f"{layers}_" if layers else ""
        held = getattr(module, f"{at}inv_freq")
        if 2 * held.numel() != head_size(module.config):
            raise UnsupportedFeature(f"training.rotation: {name} rotates a part of each head only. Use another model")
        want = _frequencies(module, layers, kind, "cpu")
        if held.dtype != torch.float32 or not torch.equal(held.cpu(), want):
            raise UnsupportedFeature(
                f"training.rotation: the frequencies of {name} are rounded. Load the model with from_pretrained(..., "
                "dtype=...); model.to(dtype) and model.half() round them"
            )


def _rotations(module: torch.nn.Module) -> list[tuple[str, str]]:
    """The kinds of a rotary module's rotations, each with its type of layers; "" for a module with one rotation."""
    return list(module.rope_type.items() if isinstance(module.rope_type, dict) else [("", module.rope_type)])


def _frequencies(module: torch.nn.Module, layers: str, kind: str, device: Any) -> torch.Tensor:
    """A rotation's frequencies, computed on `device`."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    own = {"layer_type": layers} if layers else {}
    compute = type(module).compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    with torch.device(device):
        return compute(module.config, **own)[0]


def take_frequencies(module: torch.nn.Module) -> None:
    """Compute a rotary module's frequencies where the sampler does: on its device. Powers round in other ways there.

    transformers computes them on the host, whatever the device. Modules on the host keep theirs.
    """
    for layers, kind in _rotations(module) if hasattr(module, "rope_type") else ():
        name = f"{layers}_inv_freq" if layers else "inv_freq"
        held = getattr(module, name)
        if held.device.type != "cpu":
            vars(module).setdefault(FREQUENCIES, {})[name] = held
            setattr(module, name, _frequencies(module, layers, kind, held.device))


def return_frequencies(module: torch.nn.Module) -> None:
    """Give a rotary module back the frequencies that `take_frequencies` replaced."""
    for name, held in vars(module).pop(FREQUENCIES, {}).items():
        setattr(module, name, held)


def routers(planned: list[Planned]) -> list[int]:
    """The layers whose experts a router chooses, in the order in which the routers run."""
    return [int(_LAYER.search(held.name)[1]) for held in planned if held.forward is _router]


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _OWN() -> None:
    """Stands for a module's own forward."""


def _linear(self, x):
    return self._bi_patch.functions["linear"](x, self.weight, self.bias, self._bi_patch_parts)


def _head(self, hidden):
    state = self._bi_patch
    asked = state.asked
    if asked is None:
        return state.functions["linear"](hidden, self.weight, self.bias, 1)
    rows = hidden.reshape(-1, hidden.shape[-1])[asked.rows]
    given = asked.tokens, asked.temperature, asked.top_k, asked.top_p, asked.softcap
    return state.functions["head"](rows, self.weight, *given, state.form.runner, state.form.processed)


def _embedding(self, ids):
    state = self._bi_patch
    padding = -1 if self.padding_idx is None else self.padding_idx
    found = state.functions["embedding"](ids, self.weight, state.dtype, padding)
    if state.parts > 1:
        found = found + 0.0  # ranks share the rows, and their sum makes a -0 a 0
    scale = getattr(self, "scalar_embed_scale", None)
    return found if scale is None else found * torch.tensor(scale, dtype=state.dtype, device=found.device)


def _norm(self, x):
    eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
    return self._bi_patch.functions["rms_norm"](x, self.weight, eps, self._bi_patch.family.offset)


def _turned_norm(self, x):
    """x: [batch, heads, length, size]. Gradients of sequences need the tokens first."""
    return _norm(self, x.transpose(1, 2)).transpose(1, 2)


def _head_norm(self, x):
    return self._bi_patch.functions["head_norm"](x, self.weight, self.variance_epsilon)


def _mlp(self, x):
    gated = self._bi_patch.functions["gated"]
    return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), ACTIVATIONS[_activation(self.config)]))


def _router(self, hidden):
    """The router: logits, weights (fp32) and ids of the chosen experts."""
    functions, asked = self._bi_patch.functions, self._bi_patch.asked
    logits = functions["linear"](hidden.reshape(-1, hidden.shape[-1]), self.weight, None, 1)
    weights, ids = functions["route"](logits, self.top_k, getattr(self, "norm_topk_prob", True))
    if asked is not None and asked.chosen is not None:
        asked.chosen.append(ids)
    return logits, weights, ids


def _experts(self, hidden, ids, weights):
    kind = ACTIVATIONS[_activation(self.config)]
    return self._bi_patch.functions["experts"](hidden, weights, ids, self.gate_up_proj, self.down_proj, kind)


def _rotary(self, x, position_ids, *args, **kwargs):
    """The table of the armed rotation: (cosines and sines [B, T, D], None)."""
    cos, sin = type(self).forward(self, x, position_ids, *args, **kwargs)
    half = cos.shape[-1] // 2
    return torch.cat((cos[..., :half], sin[..., :half]), -1), None
