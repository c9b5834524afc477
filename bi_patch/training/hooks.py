"""The hooks of a transformers model as a whole: before its forward, its attention and mask functions, its rotation."""

from __future__ import annotations

import types

import torch
from packaging.version import Version

from bi_patch.errors import MissingDependency, UnsupportedFeature
from bi_patch.training import forwards, layout, ops

NAME = "bi_patch"  # of the attention function and of the mask function
_MAJOR = 5  # of transformers
_LAYOUT = "bi_patch_layout"  # the keyword argument that carries starts and lengths to the attention function


def check_release() -> None:
    """Raise MissingDependency for a release of transformers whose hooks nobody checked."""
    import transformers

    if Version(transformers.__version__).major != _MAJOR:
        raise MissingDependency(
            f"training.transformers: bi_patch knows the hooks of transformers {_MAJOR}, and {transformers.__version__} "
            f"is installed. Install transformers {_MAJOR}"
        )


def prepare(base, args, kwargs):
    """Before the base model's forward: find the sequences, count their positions, refuse what a sampler never sees."""
    state = base._bi_patch
    given = {**kwargs, **dict(zip(state.names, args))}
    tokens = given.get("input_ids")
    tokens = given["inputs_embeds"] if tokens is None else tokens
    if torch.is_autocast_enabled(tokens.device.type):
        raise UnsupportedFeature(
            "training.autocast: autocast changes dtypes between layers. Leave the context, and arm a model whose "
            "parameters are in the sampler's dtype, or in float32 with the argument dtype"
        )
    if state.asked is None and not torch.compiler.is_compiling():  # training.logprobs has looked
        forwards.check_unchanged(state.plan[0].module, state.plan)
    if given.get("past_key_values") is not None or given.get("use_cache"):
        raise UnsupportedFeature("training.cache: an armed model keeps no KV cache. Let the sampler generate")
    batch, length = tokens.shape[:2]
    mask, positions, cumulative = (given.get(name) for name in ("attention_mask", "position_ids", "cu_seq_lens_q"))
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != (batch, length)):
        raise UnsupportedFeature(
            "training.mask: the attention mask is no padding mask. Give one of the batch's shape [B, T]"
        )
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
    beside = None if cumulative is None else mask
    checked = layout.positions(*where, batch * length, None if positions is None else positions.reshape(-1), beside)
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
        raise UnsupportedFeature(
            f"training.attention: no cover for {', '.join(k for k, v in odd.items() if v)}. Call the armed model "
            "itself, and leave these out"
        )
    batch, heads, length, size = query.shape
    rows = [x.transpose(1, 2).reshape(batch * length, x.shape[1], size) for x in (query, key, value)]
    scale = size**-0.5 if scaling is None else scaling
    state = module._bi_patch
    backend = state.form.backends[module.layer_idx] if state.form.backends else ""
    found = state.functions["attention"](*rows, *where, scale, sliding_window or 0, softcap or 0.0, backend)
    return found.view(batch, length, heads, size), None


def _rotate(q, k, table):
    """q [B, heads, T, D] and k, rotated by the table [B, T, D] of an armed model."""
    batch, _, length, size = q.shape
    held = table.expand(batch, length, size).reshape(batch * length, size)

    def turn(x):
        rows = x.transpose(1, 2).reshape(batch * length, x.shape[1], size)
        return ops.rope(rows, held).view(batch, length, -1, size).transpose(1, 2)

    return turn(q), turn(k)


def open_rotation(module: types.ModuleType) -> None:
    """Let the module's rotation serve armed models too: their rotary modules give a table instead of cos and sin."""
    own = module.apply_rotary_pos_emb
    if getattr(own, "_bi_patch", False):
        return

    def apply_rotary_pos_emb(q, k, cos, sin, *args, **kwargs):
        return _rotate(q, k, cos) if sin is None else own(q, k, cos, sin, *args, **kwargs)

    apply_rotary_pos_emb._bi_patch = True
    module.apply_rotary_pos_emb = apply_rotary_pos_emb


def register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)


def _no_mask(*args, **kwargs):
    """The mask function: the layout takes the place of a mask."""
    return None
