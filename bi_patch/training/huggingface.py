"""Arm a model of Hugging Face transformers in place: its own code runs, and its leaves compute the sampler's bits.

The hooks are transformers' own: an attention function and a mask function of a name of their own, and a forward of each
leaf module. The rotation is a function of the model's module. The armed model's rotary table says which of two
rotations is meant, so that other models of the same class keep theirs.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._inductor import config as inductor

from bi_patch.errors import BiPatchError, UnsupportedFeature
from bi_patch.training import devices, layout, ops
from bi_patch.training.families import ACTIVATIONS, FAMILIES, ROTATIONS, ROW_PARALLEL, Family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "bi_patch"  # of the attention function and of the mask function
_LAYOUT = "bi_patch_layout"
_HELD = "_bi_patch"


@dataclass
class Asked:
    """What the head is to compute instead of logits: the logprobs of `tokens`, from the hidden states in `rows`.

    rows, tokens: [n] int64. The other fields are as in bi_patch.training.cpu.head.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    softcap: float


@dataclass
class Armed:
    """The state of an armed model.

    dtype: what all rows are computed in. parts: how many ranks of the sampler share the K of row-parallel layers.
    contract: what the sampler and this model agreed on. functions: the operators that the leaves call, by name. A way
    to compute gradients may replace them. layout: starts and lengths of the last forward's sequences. asked: set while
    the head computes logprobs.
    """

    dtype: torch.dtype
    family: Family
    parts: int = 1
    contract: dict[str, Any] = field(default_factory=dict)
    before: tuple[Any, ...] = ()
    names: tuple[str, ...] = ()
    layout: tuple[torch.Tensor, torch.Tensor] | None = None
    asked: Asked | None = None
    functions: dict[str, Callable] = field(
        default_factory=lambda: {
            "attention": ops.attention,
            "embedding": ops.embedding,
            "experts": ops.experts,
            "gated": ops.gated,
            "head": ops.token_logprobs,
            "linear": ops.linear,
            "rms_norm": ops.rms_norm,
            "rope": ops.rope,
            "route": ops.route,
        }
    )


def unwrapped(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, torch.nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def armed(model: torch.nn.Module) -> Armed | None:
    """The state of an armed model, or None if the model is not armed."""
    return vars(unwrapped(model)).get(_HELD)


def arm(model: torch.nn.Module, dtype: torch.dtype, parts: int = 1) -> Armed:
    """Give every leaf of a model the sampler's operators. Raises UnsupportedFeature for what has no cover, by name.

    dtype: what the sampler computes in. Parameters in fp32 beside another dtype are master weights. parts: the
    sampler's tensor-parallel size.
    """
    model = unwrapped(model)
    if armed(model) is not None:
        raise BiPatchError("training.arm: the model is armed already. Call disarm first")
    family = _family(model)
    if family.experts and parts > 1:
        raise UnsupportedFeature(
            "training.parallel: a sampler whose ranks share experts is not repeated by the trainer"
        )
    plan = _plan(model, family, dtype, parts)
    devices.prepare(next(model.parameters()).device.type)
    state = Armed(dtype, family, parts, before=(model.config._attn_implementation, inductor.emulate_precision_casts))
    inductor.emulate_precision_casts = True  # compiled code rounds after every operation, as eager code does
    base = model.base_model
    state.names = tuple(inspect.signature(type(base).forward).parameters)[1:]
    _register()
    model.set_attn_implementation(NAME)
    _open_rotation(sys.modules[_module(model)])
    for module, forward in plan:
        setattr(module, _HELD, state)
        if forward is not None:
            module.forward = types.MethodType(forward, module)
    for module in {model, base}:
        setattr(module, _HELD, state)
    base._bi_patch_hook = base.register_forward_pre_hook(_prepare, with_kwargs=True)
    return state


def disarm(model: torch.nn.Module) -> None:
    """Give the model back as it was. Does nothing to a model that is not armed."""
    model = unwrapped(model)
    state = armed(model)
    if state is None:
        return
    model.base_model._bi_patch_hook.remove()
    del model.base_model._bi_patch_hook
    for module in model.modules():
        if vars(module).pop(_HELD, None) is not None:
            vars(module).pop("forward", None)
    attention, inductor.emulate_precision_casts = state.before
    model.set_attn_implementation(attention)


@contextlib.contextmanager
def asking(state: Armed, asked: Asked, config: Any) -> Iterator[None]:
    """Within the context, the model's head computes logprobs. config: the model's; its soft cap moves to the head."""
    cap = getattr(config, "final_logit_softcapping", None)
    state.asked = asked
    if cap is not None:
        config.final_logit_softcapping = None
    try:
        yield
    finally:
        state.asked = None
        if cap is not None:
            config.final_logit_softcapping = cap


# ---------------------------------------------------------------------------------------------- what each module gets


def _family(model: torch.nn.Module) -> Family:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES or not type(model).__name__.removeprefix("FSDP").endswith("ForCausalLM"):
        raise UnsupportedFeature(
            f"training.model: {type(model).__name__} ({kind}) is not covered. bi_patch covers causal language models "
            f"of transformers of these types: {', '.join(FAMILIES)}"
        )
    if getattr(model.config, "attention_dropout", 0):
        raise UnsupportedFeature(
            "training.dropout: the configuration has attention_dropout, and a sampler drops nothing. Set it to 0"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedFeature("training.quantization: a quantized model's layers have no cover in the trainer")
    return FAMILIES[kind]


def _plan(model, family: Family, dtype: torch.dtype, parts: int) -> list[tuple[torch.nn.Module, Callable | None]]:
    """Each module and the forward that it gets; None for a module whose own forward is exact."""
    plan = []
    for name, module in model.named_modules():
        forward = _forward(module, name, family, model)
        if forward is not _OWN and "forward" in vars(module):
            raise UnsupportedFeature(f"training.leaf: something else replaced the forward of {name}. Remove it first")
        plan.append((module, None if forward is _OWN else forward))
        _check_parameters(name, module, dtype)
        module_parts = parts if name.rpartition(".")[2] in ROW_PARALLEL else 1
        if module_parts > 1 and module.weight.shape[1] % parts:
            raise UnsupportedFeature(f"training.parallel: {parts} ranks cannot share the input of {name} equally")
        if forward is _linear:
            module._bi_patch_parts = module_parts
    return plan


def _check_parameters(name: str, module: torch.nn.Module, dtype: torch.dtype) -> None:
    for own, parameter in module.named_parameters(recurse=False):
        if parameter.dtype not in (dtype, torch.float32):
            raise UnsupportedFeature(
                f"training.dtype: {name}.{own} is {parameter.dtype}, and the sampler computes in {dtype}. Parameters "
                f"are in {dtype}, or in float32 as master weights"
            )


def _forward(module: torch.nn.Module, name: str, family: Family, model: torch.nn.Module) -> Callable:
    """The forward for one module. Raises UnsupportedFeature with the module's name and class if it has no cover."""
    kind, prefix = type(module).__name__.removeprefix("FSDP"), family.prefix
    if type(module) is torch.nn.Linear:
        return _head if module is model.get_output_embeddings() else _linear
    if type(module) is torch.nn.Embedding or kind == f"{prefix}TextScaledWordEmbedding":
        if module.max_norm is not None:
            raise UnsupportedFeature(f"training.leaf: {name} has max_norm, which changes weights in a forward")
        return _embedding
    if kind == f"{prefix}RMSNorm":
        return _norm
    if kind == f"{prefix}MLP":
        if ACTIVATIONS.get(_activation(module.config)) is None:
            raise UnsupportedFeature(f"training.leaf: {name} has the activation {_activation(module.config)}")
        return _mlp
    if family.experts and kind == f"{prefix}TopKRouter":
        return _router
    if family.experts and kind == f"{prefix}Experts":
        if ACTIVATIONS.get(_activation(module.config)) is None:
            raise UnsupportedFeature(f"training.leaf: {name} has the activation {_activation(module.config)}")
        return _experts
    if kind == f"{prefix}RotaryEmbedding":
        _check_rotation(name, module)
        return _rotary
    if isinstance(module, torch.nn.Dropout) and module.p:
        raise UnsupportedFeature(f"training.dropout: {name} drops a share of {module.p}. Set it to 0")
    if isinstance(module, (torch.nn.Dropout, torch.nn.Identity, torch.nn.ModuleList)):
        return _OWN
    if any(base.__module__ == _module(model) for base in type(module).__mro__) and list(module.children()):
        return _OWN
    if name.endswith(".act_fn"):
        return _OWN  # the MLP's forward does not call it
    raise UnsupportedFeature(
        f"training.leaf: {name} ({type(module).__module__}.{type(module).__qualname__}) has no cover in the trainer"
    )


def _module(model: torch.nn.Module) -> str:
    """The module of transformers that defines the model's class. FSDP2 puts a class of its own before it."""
    return next(base.__module__ for base in type(model).__mro__ if base.__module__.startswith("transformers.models."))


def _activation(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or config.hidden_act


def _check_rotation(name: str, module: torch.nn.Module) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kinds = module.rope_type if isinstance(module.rope_type, dict) else {"": module.rope_type}
    for layers, kind in kinds.items():
        if kind not in ROTATIONS:
            raise UnsupportedFeature(
                f"training.rotation: {name} has the rotation {kind!r}. The tables of other rotations than "
                f"{', '.join(ROTATIONS)} may differ between transformers and vLLM"
            )
        parameters = module.config.rope_parameters[layers] if layers else module.config.rope_parameters
        if kind == "linear" and math.frexp(parameters["factor"])[0] != 0.5:
            raise UnsupportedFeature(
                f"training.rotation: {name} divides by {parameters['factor']}, and the tables of transformers and vLLM "
                "are equal only for a power of two"
            )
        at = f"{layers}_" if layers else ""
        held = getattr(module, f"{at}inv_freq")
        if 2 * held.numel() != _head_size(module.config):
            raise UnsupportedFeature(f"training.rotation: {name} rotates a part of each head only")
        own = {"layer_type": layers} if layers else {}
        compute = type(module).compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
        want = compute(module.config, **own)[0]
        if held.dtype != torch.float32 or (held.device.type == "cpu" and not torch.equal(held, want)):
            raise UnsupportedFeature(
                f"training.rotation: the frequencies of {name} are rounded. Load the model with from_pretrained(..., "
                "dtype=...); model.to(dtype) and model.half() round them"
            )


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _OWN() -> None:
    """Stands for a module's own forward."""


# ------------------------------------------------------------------------------------------------- forwards of leaves


def _linear(self, x):
    return self._bi_patch.functions["linear"](x, self.weight, self.bias, self._bi_patch_parts)


def _head(self, hidden):
    state = self._bi_patch
    asked = state.asked
    if asked is None:
        return state.functions["linear"](hidden, self.weight, self.bias, 1)
    rows = hidden.reshape(-1, hidden.shape[-1])[asked.rows]
    return state.functions["head"](
        rows, self.weight, asked.tokens, asked.temperature, asked.top_k, asked.top_p, asked.softcap
    )


def _embedding(self, ids):
    state = self._bi_patch
    found = state.functions["embedding"](ids, self.weight, state.dtype)
    scale = getattr(self, "scalar_embed_scale", None)
    return found if scale is None else found * torch.tensor(scale, dtype=state.dtype, device=found.device)


def _norm(self, x):
    eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
    return self._bi_patch.functions["rms_norm"](x, self.weight, eps, self._bi_patch.family.offset)


def _mlp(self, x):
    gated = self._bi_patch.functions["gated"]
    return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), ACTIVATIONS[_activation(self.config)]))


def _router(self, hidden):
    """The router: logits, weights (fp32) and ids of the chosen experts."""
    functions = self._bi_patch.functions
    logits = functions["linear"](hidden.reshape(-1, hidden.shape[-1]), self.weight, None, 1)
    weights, ids = functions["route"](logits, self.top_k, getattr(self, "norm_topk_prob", True))
    return logits, weights, ids


def _experts(self, hidden, ids, weights):
    kind = ACTIVATIONS[_activation(self.config)]
    return self._bi_patch.functions["experts"](hidden, weights, ids, self.gate_up_proj, self.down_proj, kind)


def _rotary(self, x, position_ids, *args, **kwargs):
    """The table of the armed rotation: (cosines and sines [B, T, D], None)."""
    cos, sin = type(self).forward(self, x, position_ids, *args, **kwargs)
    half = cos.shape[-1] // 2
    return torch.cat((cos[..., :half], sin[..., :half]), -1), None


# ------------------------------------------------------------------------------------- hooks of the model as a whole


def _prepare(base, args, kwargs):
    """Before the base model's forward: find the sequences, count their positions, refuse what a sampler never sees."""
    state = base._bi_patch
    given = {**kwargs, **dict(zip(state.names, args))}
    tokens = given.get("input_ids")
    tokens = given["inputs_embeds"] if tokens is None else tokens
    if torch.is_autocast_enabled(tokens.device.type):
        raise UnsupportedFeature(
            "training.autocast: autocast changes dtypes between layers. Leave the context, and arm a model whose "
            "parameters are in the sampler's dtype, or in float32 with dtype=..."
        )
    if given.get("past_key_values") is not None or given.get("use_cache"):
        raise UnsupportedFeature("training.cache: an armed model keeps no KV cache. Let the sampler generate")
    batch, length = tokens.shape[:2]
    mask, positions, cumulative = (given.get(name) for name in ("attention_mask", "position_ids", "cu_seq_lens_q"))
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != (batch, length)):
        raise UnsupportedFeature("training.mask: the attention mask is no padding mask of the batch's shape [B, T]")
    if positions is not None:
        positions = positions.expand(batch, length)
    if cumulative is not None:
        where = layout.cumulative(cumulative)
    elif mask is not None:
        where = layout.padded(mask)
    elif positions is not None:
        where = layout.packed(positions)
    else:
        where = layout.full(batch, length, tokens.device)
    checked = layout.positions(*where, batch * length, None if positions is None else positions.reshape(-1))
    state.layout = where
    own = {"attention_mask": None, "position_ids": checked.view(batch, length), "use_cache": False, _LAYOUT: where}
    return (), given | own


def _attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None, **kwargs
):
    """The attention function: query [B, heads, T, D], key and value [B, kv heads, T, D] -> [B, T, heads, D]."""
    where = kwargs.get(_LAYOUT)
    odd = {
        "a call that does not come from the armed model": where is None,
        "dropout": bool(dropout),
        "an attention mask": attention_mask is not None,
        "attention sinks": kwargs.get("s_aux") is not None,
        "attention that is not causal": not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False,
    }
    if any(odd.values()):
        raise UnsupportedFeature(f"training.attention: no cover for {', '.join(k for k, v in odd.items() if v)}")
    batch, heads, length, size = query.shape
    rows = [x.transpose(1, 2).reshape(batch * length, x.shape[1], size) for x in (query, key, value)]
    scale = size**-0.5 if scaling is None else scaling
    found = module._bi_patch.functions["attention"](*rows, *where, scale, sliding_window or 0, softcap or 0.0)
    return found.view(batch, length, heads, size), None


def _rotate(q, k, table):
    """q [B, heads, T, D] and k, rotated by the table [B, T, D] of an armed model."""
    batch, _, length, size = q.shape
    held = table.expand(batch, length, size).reshape(batch * length, size)

    def turn(x):
        rows = x.transpose(1, 2).reshape(batch * length, x.shape[1], size)
        return ops.rope(rows, held).view(batch, length, -1, size).transpose(1, 2)

    return turn(q), turn(k)


def _open_rotation(module: types.ModuleType) -> None:
    """Let the module's rotation serve armed models too: their rotary modules give a table instead of cos and sin."""
    own = module.apply_rotary_pos_emb
    if getattr(own, "_bi_patch", False):
        return

    def apply_rotary_pos_emb(q, k, cos, sin, *args, **kwargs):
        return _rotate(q, k, cos) if sin is None else own(q, k, cos, sin, *args, **kwargs)

    apply_rotary_pos_emb._bi_patch = True
    module.apply_rotary_pos_emb = apply_rotary_pos_emb


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)


def _no_mask(*args, **kwargs):
    """The mask function: the layout takes the place of a mask."""
    return None
