"""Kimi Linear on CUDA: layers of Kimi delta attention and of MLA, in vLLM's package of Kimi K3 (vllm.models.kimi_k3).

Delta attention takes one token after the other, by bundled kernels (kernels/cuda/kda.cu). MLA has a layer class of its
own there, which projects, rotates nothing and calls its own attention; bi_patch attends as for other models (mla.py).
Kimi K3 itself has further layers in this package, and stays refused by name.
"""

from __future__ import annotations

import functools
from typing import Any

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.cuda import mla, mla_steps, recurrent
from bi_patch.seams.model import Policy, Seam, Target

_RELEASES = ">=0.33"
_NAME = "KimiLinearForCausalLM"
_DELTA = "vllm.model_executor.layers.mamba.gdn.kimi_gdn_linear_attn"
_PACKAGE = "vllm.models.kimi_k3.nvidia"
_DELTA_LAYER, _MLA_LAYER = "KimiGatedDeltaNetAttention", "MultiHeadLatentAttention"
_MLA_BACKEND = "FLASH_ATTN_MLA"


def _delta(original):
    """KimiGatedDeltaNetAttention._forward: the bundled kernels, for prompts and decodes alike, and the gated norm."""
    from vllm.compilation.breakable_cudagraph import eager_break_during_capture

    from bi_patch.ops.cuda import causal_conv, kda
    from bi_patch.ops.cuda.recurrent import define_ops, gated_rms_norm

    define_ops()

    @eager_break_during_capture
    def _forward(self, mixed_qkv, g1, g2, beta, core_attn_out):
        meta = recurrent.of_step(self)
        tokens = 0 if meta is None else meta.num_actual_tokens
        core_attn_out[:, tokens:].zero_()
        if not tokens:
            return
        weight, spans, (inputs, states) = self.conv1d.weight, recurrent.spans_of(meta), self.kv_cache
        weight = weight.view(weight.size(0), weight.size(-1))
        y = causal_conv.run(mixed_qkv[:tokens], weight, self.conv1d.bias, inputs, spans, gated=False)
        out = core_attn_out[0, :tokens]
        kda.run(out, y, g1[0, :tokens].flatten(1), beta[0, :tokens], self.A_log, self.dt_bias, states, spans)
        out.copy_(gated_rms_norm(out, g2[:tokens], self.o_norm.weight.data, self.o_norm.eps, True))

    return _forward


def _unknown_delta(layer) -> str:
    """What the kernels do not compute of a layer of delta attention, in words, else ""."""
    from bi_patch.ops.cuda import kda

    if layer.gate_lower_bound is not None:
        return f"decays of at least {layer.gate_lower_bound}"
    if layer.num_spec:
        return "drafts. Leave speculative decoding out"
    if layer.o_norm.activation != "sigmoid" or layer.o_norm.weight is None:
        return "another gate of its norm than the sigmoid"
    if layer.local_num_heads % 2:  # a row of the projection has an element for each head: rows need 4 bytes
        return f"{layer.local_num_heads} heads; an even number works"
    return kda.uncovered(layer.head_dim, layer.conv_size)


def _prepare_delta(layer) -> str:
    from bi_patch.ops.cuda import causal_conv, kda

    weight = layer.conv1d.weight
    failed = causal_conv.prepare(weight.size(0), weight.size(-1), gated=False, floats=weight.dtype.itemsize == 4)
    return failed or kda.prepare(layer.local_num_heads)


def _latent(original):
    """MultiHeadLatentAttention._attention: cache the latents, then attend as MLA of other models does."""
    from vllm.compilation.breakable_cudagraph import eager_break_during_capture

    @eager_break_during_capture
    def _attention(self, positions, q, kv_c_normed, k_pe, attn_out):
        from vllm.forward_context import get_forward_context

        context = get_forward_context()
        if context.attn_metadata is None:
            attn_out.zero_()
            return
        meta = context.attn_metadata[self.layer_name]
        tokens = meta.num_actual_tokens
        attn_out[tokens:].zero_()
        q, latents, rotary, out = q[:tokens], kv_c_normed[:tokens], k_pe[:tokens], attn_out[:tokens]
        slots = context.slot_mapping[self.layer_name][:tokens]
        self.impl.do_kv_cache_update(latents, rotary, self.kv_cache, slots, self.kv_cache_dtype, self._k_scale)
        if mla_steps.two_forms():
            mla.attend(self, q, latents, rotary, self.kv_cache, meta, out)
        else:
            _absorbed(self, q, meta, out)

    return _attention


def _absorbed(layer, q, meta, out) -> None:
    """One form: every row takes the absorbed form."""
    from bi_patch.kernels.triton import heads as products

    rows, heads, _ = q.shape
    if meta.num_decode_tokens != rows:
        raise UnsupportedFeature(
            f"kimi.cuda_mla: {rows - meta.num_decode_tokens} rows are not in the absorbed form. Set "
            "BI_PATCH=0, and report this as a bug of bi_patch"
        )
    nope, rotary = q.split([layer.qk_nope_head_dim, layer.qk_rope_head_dim], dim=-1)
    low = q.new_empty((rows, heads, layer.kv_lora_rank))
    products.product(nope.transpose(0, 1), layer.W_UK_T, low.transpose(0, 1))
    some, _ = layer.impl.forward_mqa((low, rotary), layer.kv_cache, meta, layer)
    products.product(some.transpose(0, 1), layer.W_UV, out.view(rows, heads, layer.v_head_dim).transpose(0, 1))


def _latent_init(original):
    """MultiHeadLatentAttention.__init__: refuse every other backend and option."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        _refuse_latent(self)

    return __init__


def _refuse_latent(layer) -> None:
    name, kind = layer.attn_backend.get_name(), layer.kv_cache_dtype
    refused = {
        f"the {name} backend": name != _MLA_BACKEND,
        f"a {kind} KV cache": kind not in ("auto", "bfloat16"),
        "attention to later tokens": layer.non_causal_multi_token_decode,
        "rotated queries": layer.rotary_emb is not None,
        "low-rank queries": layer.q_lora_rank is not None,
        "an output gate": layer.use_output_gate,
        "context parallelism": layer.dcp_world_size > 1,
        "heads on several ranks": layer.num_local_heads != layer.num_heads,
        "a projection that adds ranks": layer.gemm_rs_ar is not None,
    }
    found = [words for words, present in refused.items() if present] + mla.without_kernel(layer)
    if found:
        raise UnsupportedFeature(
            f"kimi.cuda_mla: bi_patch has no certificate for {', '.join(found)}. Use --attention-backend "
            f"{_MLA_BACKEND} on Hopper and the default options, or set BI_PATCH=0"
        )


def _few_rows(original):
    """enable_kimi_k3_low_latency_gemm: nothing, so that every projection is a linear layer with a certified route."""

    def enable_kimi_k3_low_latency_gemm(module, dtype) -> None:
        return None

    return enable_kimi_k3_low_latency_gemm


def _no_ranks(original):
    """maybe_init_gemm_rs_ar: False: no projection adds the ranks' parts by itself."""

    def maybe_init_gemm_rs_ar(vllm_config, use_sequence_parallel) -> bool:
        return False

    return maybe_init_gemm_rs_ar


def _refuse(config: Any) -> None:
    """Refuse what the package computes for Kimi K3 only, and what nobody has compared."""
    model = config.model_config
    if model is None or _NAME not in (getattr(model, "architectures", None) or ()):
        return
    text, parallel = model.hf_text_config, config.parallel_config
    delta = getattr(text, "linear_attn_config", None) or {}
    more = config.additional_config if isinstance(config.additional_config, dict) else {}
    refused = {
        "a gate of full rank": delta.get("use_full_rank_gate", False),
        "attention over residuals": getattr(text, "attn_res_block_size", None) is not None,
        "latent experts": getattr(text, "routed_expert_hidden_size", None) is not None,
        f"the activation {getattr(text, 'hidden_act', None)}": getattr(text, "hidden_act", None) != "silu",
        f"the weights' scheme {model.quantization}": model.quantization is not None,
        "speculative decoding": config.speculative_config is not None,
        "more than one rank": parallel.world_size > 1 or parallel.data_parallel_size > 1,
        "the specialized decode": more.get("decode_backend", "auto") != "auto",
    }
    found = [words for words, present in refused.items() if present]
    if found:
        raise UnsupportedFeature(
            f"kimi.cuda: bi_patch does not cover Kimi Linear with {', '.join(found)}. Leave the option out, use "
            "another model, or set BI_PATCH=0"
        )


def _seam(name: str, module: str, qualname: str, close, why: str, how: str, causes, **given) -> Seam:
    return Seam(
        name=f"kimi.cuda_{name}",
        targets=(Target(module, qualname, _RELEASES, given.pop("copies", ())),),
        releases=_RELEASES,
        close=close,
        why=why,
        how=how,
        causes=causes,
        on_import=True,
        **given,
    )


_OWN = "the package of Kimi K3 calls MLA's kernels by itself, and chooses the form by a request's number of new tokens"

POLICIES = (
    Policy(
        name="kimi.cuda",
        apply=_refuse,
        releases=_RELEASES,
        why="Kimi Linear shares its package with Kimi K3, which has layers and kernels that no patch point reaches",
    ),
)

SEAMS = (
    _seam(
        "delta",
        _DELTA,
        f"{_DELTA_LAYER}._forward",
        _delta,
        "the stock kernels start their chunks where an engine step starts, and decode by other kernels",
        "the bundled kernels take one token after the other, in prompts and decodes, and keep the state in fp32",
        (24,),
        until="upstream's kernels place their chunks by position, and decode has the bits of prefill",
        serves=(_DELTA_LAYER,),
        op="bi_patch.ops.cuda.kda",
    ),
    _seam(
        "states",
        _DELTA,
        f"{_DELTA_LAYER}.get_state_shape",
        recurrent.shape(recurrent.inputs_and_state, _unknown_delta, _prepare_delta),
        "the kernels keep states in bf16 and fp32, and a step ends where a state is cached",
        "other states are refused, and the kernels are compiled before any step",
        (24,),
        until="never: bi_patch itself decides here which layers it accepts",
    ),
    _seam(
        "mla",
        f"{_PACKAGE}.mla",
        f"{_MLA_LAYER}._attention",
        _latent,
        f"{_OWN}. vLLM merges a chunk with its context where the scheduler cut",
        "the layer caches its latents and attends as MLA of other models does",
        (6, 7, 9),
        until="upstream chooses the form by position (https://github.com/vllm-project/vllm/issues/27433)",
        serves=(_MLA_LAYER,),
        relies=("vllm.v1.attention.backend:MLAAttentionImpl.do_kv_cache_update",),
    ),
    _seam(
        "mla_backend",
        f"{_PACKAGE}.mla",
        f"{_MLA_LAYER}.__init__",
        _latent_init,
        "a backend whose form, split or tile depends on the batch gives bits that depend on the batch",
        "bi_patch refuses other backends than FlashAttention-MLA, and options without a certificate",
        (3, 4),
        until="never: bi_patch itself decides here which backends it accepts",
    ),
    _seam(
        "few_rows",
        f"{_PACKAGE}.low_latency_gemm",
        "enable_kimi_k3_low_latency_gemm",
        _few_rows,
        "special kernels serve up to 16 rows of some projections",
        "bi_patch turns these kernels off, so that a projection is a linear layer with a certified route",
        (1,),
        until="upstream's mode keeps the linear method of these projections",
        copies=(f"{_PACKAGE}.model",),
    ),
    _seam(
        "ranks",
        f"{_PACKAGE}.model",
        "maybe_init_gemm_rs_ar",
        _no_ranks,
        "a kernel of CuTe DSL adds the ranks' parts of a projection, for some numbers of rows",
        "bi_patch turns the kernel off. So the model also starts where CuTe DSL is not installed",
        (14,),
        until="upstream's mode turns the kernel off",
    ),
)
