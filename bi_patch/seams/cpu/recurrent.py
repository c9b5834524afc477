"""Layers with a recurrent state on CPU: the bundled kernels run a request's tokens one after the other, in one order.

vLLM's kernels cut a prompt into chunks where an engine step starts, and decode by another kernel. The bundled kernels
have no chunks, and keep the states exactly. So it does not matter which step brings a token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Seam, Target
from bi_patch.seams.models import cured

# vLLM's names of the states that the kernels keep.
_BACKENDS = frozenset({"GDN_ATTN", "MAMBA1", "MAMBA2", "SHORT_CONV"})
_FOLDER = "vllm.model_executor.layers.mamba"
_GDN = f"{_FOLDER}.ops.cpu.gdn_attention"


def _backend(original):
    """get_mamba_attn_backend: let in the kinds of layers whose states the bundled kernels keep."""

    def get_mamba_attn_backend(mamba_type):
        return mamba_type.get_class() if mamba_type.name in _BACKENDS else original(mamba_type)

    return get_mamba_attn_backend


def _gated_delta_net(original):
    """_cpu_gdn_attention_nonspec: the convolution, then the gated delta rule, for prompts and decodes alike."""
    from bi_patch.ops.cpu import recurrent

    def _cpu_gdn_attention_nonspec(layer, attn_metadata_i, mixed_qkv, b, a, core_attn_out):
        meta = attn_metadata_i
        spans, tokens = _spans(meta), meta.num_decode_tokens + meta.num_prefill_tokens
        conv_states, states = layer.kv_cache
        weight = layer.conv1d.weight
        x = recurrent.causal_conv(
            mixed_qkv[:tokens],
            weight.view(weight.size(0), weight.size(-1)),
            layer.conv1d.bias,
            conv_states,
            spans,
            layer.activation == "silu",
        )
        heads, values, keys = states.shape[1:]
        recurrent.gated_delta_rule(
            core_attn_out,
            x,
            a[:tokens],
            b[:tokens],
            -layer.A_log.float().exp(),
            layer.dt_bias.float(),
            states.view(-1, heads, keys, values),
            spans,
            layer.num_k_heads // layer.tp_size,
        )

    return _cpu_gdn_attention_nonspec


def _spans(meta):
    """The requests of a step, as the kernels take them. meta: metadata of a gated delta net, in which decodes come
    first."""
    import torch

    from bi_patch.ops.cpu.recurrent import Spans

    requests = meta.num_decodes + meta.num_prefills
    if meta.has_initial_state is None:
        fresh = torch.zeros(requests, dtype=torch.bool)
    else:
        fresh = ~meta.has_initial_state[:requests]
    return Spans(
        meta.non_spec_query_start_loc[: requests + 1].to(torch.int32).contiguous(),
        meta.non_spec_state_indices_tensor[:requests].to(torch.int32).contiguous(),
        fresh,
    )


def _spans_in_two(meta):
    """The same of metadata that lists decodes (d) and prompts (p) apart: of Mamba 2 and short convolutions."""
    import torch

    from bi_patch.ops.cpu.recurrent import Spans

    decodes = meta.num_decode_tokens  # one token each
    starts, slots = [torch.arange(decodes + 1, dtype=torch.int32)], []
    fresh = torch.zeros(decodes + meta.num_prefills, dtype=torch.bool)
    if decodes:
        slots.append(meta.state_indices_tensor_d.view(decodes, -1)[:, 0])
    if meta.num_prefills:
        starts.append(meta.query_start_loc_p[1 : meta.num_prefills + 1] + decodes)
        slots.append(meta.state_indices_tensor_p[: meta.num_prefills])
        fresh[decodes:] = ~meta.has_initial_states_p[: meta.num_prefills]
    return Spans(torch.cat(starts).to(torch.int32), torch.cat(slots).to(torch.int32).contiguous(), fresh)


def _of_step(layer):
    """vLLM's metadata of a step for a layer, None while vLLM profiles."""
    from vllm.forward_context import get_forward_context

    held = get_forward_context().attn_metadata
    return None if held is None else held.get(layer.prefix)


def _mamba2(original):
    """MambaMixer2.conv_ssm_forward: the convolution, then Mamba 2's recurrence, for prompts and decodes alike."""
    from bi_patch.ops.cpu import recurrent

    def conv_ssm_forward(self, projected_states, output):
        meta = _of_step(self)
        if meta is None:  # vLLM's own warms up Triton kernels
            output.zero_()
            return
        spans, tokens = _spans_in_two(meta), meta.num_decode_tokens + meta.num_prefill_tokens
        sizes = [self.tped_intermediate_size, self.tped_conv_size, self.tped_dt_size]
        _, inputs, dt = projected_states[:tokens].split(sizes, dim=-1)
        conv_states, states = self.kv_cache
        weight = self.conv1d.weight
        x = recurrent.causal_conv(
            inputs, weight.view(weight.size(0), weight.size(-1)), self.conv1d.bias, conv_states, spans, silu=True
        )
        heads, values, keys = states.shape[1:]
        recurrent.mamba2(
            output.view(-1, heads, values),
            x,
            dt,
            self.A.float(),
            self.dt_bias.float(),
            self.D.float(),
            states.view(-1, heads, keys, values),
            spans,
            self.n_groups // self.tp_size,
        )

    return conv_ssm_forward


def _mamba1(original):
    """MambaMixer.forward_impl: the convolution and Mamba 1's recurrence, for prompts and decodes alike."""
    from bi_patch.ops.cpu import recurrent

    @functools.wraps(original)
    def forward_impl(self, hidden_states, output):
        meta = _of_step(self)
        if meta is None:
            return original(self, hidden_states, output)
        spans, tokens = _spans_in_two(meta), meta.num_decode_tokens + meta.num_prefill_tokens
        inputs, gate = self.in_proj(hidden_states[:tokens])[0].chunk(2, dim=-1)
        conv_states, states = self.kv_cache
        weight = self.conv1d.weight
        x = recurrent.causal_conv(
            inputs, weight.view(weight.size(0), weight.size(-1)), self.conv1d.bias, conv_states, spans, silu=True
        )
        dt, b, c = self._ssm_transform(x)
        y = recurrent.mamba1(
            x, dt.T.contiguous(), b, c, gate, self.A.float(), self.D.float(), self._time_proj_bias(), states, spans
        )
        output[:tokens] = self.out_proj(y)[0]

    return forward_impl


def _no_checkpoint(original):
    """MambaMixer2.get_kv_cache_spec: the scheduler ends a step where a state is cached, as for other layers."""

    @functools.wraps(original)
    def get_kv_cache_spec(self, vllm_config):
        from vllm.model_executor.layers.mamba.abstract import MambaBase

        return MambaBase.get_kv_cache_spec(self, vllm_config)

    return get_kv_cache_spec


def _short_conv(original):
    """ShortConv.forward_native: the bundled convolution between the two products, for prompts and decodes alike."""
    from bi_patch.ops.cpu import recurrent

    @functools.wraps(original)
    def forward_native(self, hidden_states, output):
        meta = _of_step(self)
        if meta is None:
            return original(self, hidden_states, output)
        tokens = meta.num_decode_tokens + meta.num_prefill_tokens
        before, after, x = self.in_proj(hidden_states[:tokens])[0].chunk(3, dim=-1)
        weight = self.conv.weight
        y = recurrent.causal_conv(
            before * x,
            weight.view(weight.size(0), weight.size(-1)),
            self.conv.bias,
            self.kv_cache[0],
            _spans_in_two(meta),
            silu=False,
        )
        output[:tokens] = self.out_proj(after * y)[0]

    return forward_native


def _of_gated_delta_net(layer) -> str:
    if layer.head_k_dim % 16 or layer.head_k_dim > 512 or layer.head_v_dim % 16:
        return (
            f"heads of {layer.head_k_dim} keys and {layer.head_v_dim} values; multiples of 16, at most 512 keys, work"
        )
    if layer.activation != "silu":
        return f"the activation {layer.activation}; silu works"
    return _of_width(layer.conv_kernel_size)


def _of_mamba2(layer) -> str:
    if layer.ssm_state_size % 16 or layer.ssm_state_size > 512 or layer.head_dim % 16:
        return f"{layer.ssm_state_size} states and heads of {layer.head_dim}; multiples of 16, at most 512 states, work"
    if layer.activation not in ("silu", "swish"):
        return f"the activation {layer.activation}; silu works"
    return "--use-replayssm. Leave it out" if layer.use_replayssm else _of_width(layer.conv_kernel_size)


def _of_mamba1(layer) -> str:
    if layer.ssm_state_size % 16:
        return f"{layer.ssm_state_size} states; multiples of 16 work"
    if layer.activation not in ("silu", "swish"):
        return f"the activation {layer.activation}; silu works"
    return _of_decays(layer) or _of_width(layer.conv_kernel_size)


def _of_decays(layer) -> str:
    """Of Mamba 1, whose kernel takes the exponential of a decay without a bound above 0."""
    return "" if bool((layer.A <= 0).all()) else "decays A that are not all at most 0, as -exp(A_log) is"


def _of_short_conv(layer) -> str:
    return _of_width(layer.L_cache)


def _of_width(width: int) -> str:
    return "" if 2 <= width <= 8 else f"a convolution over {width} tokens; 2 to 8 work"


# By the class of a layer: what the bundled kernels do not compute of it, in words, else "".
LAYERS: dict[str, Callable[[Any], str]] = {
    f"{_FOLDER}.gdn.qwen_gdn_linear_attn.QwenGatedDeltaNetAttention": _of_gated_delta_net,
    f"{_FOLDER}.mamba_mixer.MambaMixer": _of_mamba1,
    f"{_FOLDER}.mamba_mixer2.MambaMixer2": _of_mamba2,
    f"{_FOLDER}.short_conv.ShortConv": _of_short_conv,
}


def _kind(layer) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def check_again(model) -> None:
    """Raise UnsupportedFeature if new weights of a model are such that the bundled kernels do not cover them."""
    for name, layer in model.named_modules():
        if LAYERS.get(_kind(layer)) is _of_mamba1 and (found := _of_decays(layer)):
            raise UnsupportedFeature(f"recurrent.cpu_layers: on CPU, bi_patch does not cover {name}: {cured(found)}")


def check(config) -> None:
    """Raise UnsupportedFeature if a loaded model has a recurrent layer that the bundled kernels do not cover.

    config: the engine's VllmConfig, which knows the model's layers.
    """
    import torch
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

    for name, layer in config.compilation_config.static_forward_context.items():
        if not isinstance(layer, MambaBase):
            continue
        kind = _kind(layer)
        dtype, states = config.model_config.dtype, layer.get_state_dtype()
        if kind not in LAYERS:
            found = f"the recurrent layer {type(layer).__name__}. Use another model"
        elif dtype != torch.bfloat16:
            found = f"recurrent layers in {dtype}. Use --dtype bfloat16"
        elif states[0] != dtype:
            found = f"the inputs of a convolution kept in {states[0]}. Use --mamba-cache-dtype auto"
        elif any(state != torch.float32 for state in states[1:]):
            found = f"a recurrent state kept in {states[1]}. Use --mamba-ssm-cache-dtype float32"
        elif is_conv_state_dim_first():
            found = "VLLM_SSM_CONV_STATE_LAYOUT=DS. Unset it"
        elif config.cache_config.mamba_cache_mode not in ("none", "align"):
            found = f"the cache mode {config.cache_config.mamba_cache_mode!r}. Use --mamba-cache-mode align"
        else:
            found = LAYERS[kind](layer)
        if found:
            raise UnsupportedFeature(f"recurrent.cpu_layers: on CPU, bi_patch does not cover {name}: {cured(found)}")


def _seam(name: str, target: str, close, how: str, *serves: str) -> Seam:
    module, _, qualname = target.partition(":")
    return Seam(
        name=f"recurrent.cpu_{name}",
        targets=(Target(module, qualname),),
        close=close,
        why="the stock kernels start their chunks where an engine step starts, and decode by other kernels",
        how=how,
        until="upstream's kernels place their chunks by position, and decode has the bits of prefill",
        causes=(24,),
        serves=serves,
        op="bi_patch.ops.cpu.recurrent",
    )


SEAMS = (
    Seam(
        name="recurrent.cpu_backend",
        targets=(
            Target(
                "vllm.v1.attention.selector",
                "get_mamba_attn_backend",
                copies=("vllm.model_executor.layers.mamba.abstract",),
            ),
        ),
        close=_backend,
        why="upstream's batch-invariant mode knows no recurrent layer",
        how="the kinds of layers that the bundled kernels compute may start",
        until="upstream's mode covers recurrent layers",
    ),
    _seam(
        "gated_delta_net",
        f"{_GDN}:_cpu_gdn_attention_nonspec",
        _gated_delta_net,
        "the bundled kernels take one token after the other, in prompts and decodes, and keep the state in fp32",
        "QwenGatedDeltaNetAttention",
    ),
    _seam(
        "mamba1",
        f"{_FOLDER}.mamba_mixer:MambaMixer.forward_impl",
        _mamba1,
        "the bundled kernels take one token after the other, in prompts and decodes, and keep the state in fp32",
        "MambaMixer",
    ),
    _seam(
        "mamba2",
        f"{_FOLDER}.mamba_mixer2:MambaMixer2.conv_ssm_forward",
        _mamba2,
        "the bundled kernels take one token after the other, in prompts and decodes, and keep the state in fp32",
        "MambaMixer2",
    ),
    _seam(
        "mamba2_states",
        f"{_FOLDER}.mamba_mixer2:MambaMixer2.get_kv_cache_spec",
        _no_checkpoint,
        "a step ends where a state is cached, so the kernels write no state in the middle of a step",
    ),
    _seam(
        "short_conv",
        f"{_FOLDER}.short_conv:ShortConv.forward_native",
        _short_conv,
        "the bundled kernel takes one token after the other, in prompts and decodes",
        "ShortConv",
    ),
)
