"""MLA (multi-head latent attention) on CPU: one bundled kernel in the absorbed form for every token.

Stock vLLM computes prompts and generated tokens in two forms, or by two kernels, and cuts keys by the batch. Both of
its backends (AMX_MLA, CPU_MLA) keep their cache of latents, which bi_patch reads.
"""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.mla import unsplit
from bi_patch.seams.model import Seam, Target

_LAYER = "vllm.model_executor.layers.attention.mla_attention"
_AMX = "vllm.v1.attention.backends.mla.amx_mla"
_ABSORBED = "bi_patch_absorbed"  # attribute of a layer: ops.cpu.latent.Absorbed


def _init(original):
    """MLAAttention.__init__: refuse every option that the bundled kernel does not compute."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        refused = {
            "sparse attention": self.use_sparse or self.indexer is not None,
            "a sliding window": self.sliding_window is not None,
            "attention to later tokens": self.non_causal_multi_token_decode,
            f"a {self.kv_cache_dtype} KV cache": self.kv_cache_dtype != "auto",
            "context parallelism": self.use_pcp or self.impl.dcp_world_size > 1 or self.dcp_q_replicate,
            f"latents of {self.head_size}": self.head_size != 576,
        }
        found = [name for name, present in refused.items() if present]
        if found:
            raise UnsupportedFeature(
                f"mla.cpu: the bundled CPU kernel does not cover {', '.join(found)}. Set BI_PATCH=0"
            )

    return __init__


def _weights(original):
    """MLAAttention.process_weights_after_loading: pack the up-projections for the bundled GEMM, also after an update.

    The layer's own weight stays, so that it can be written in place.
    """
    from bi_patch.ops.cpu import latent

    @functools.wraps(original)
    def process_weights_after_loading(self, act_dtype):
        from vllm.model_executor.layers.attention import mla_attention

        weight = self.kv_b_proj.weight
        shape = (self.num_heads * (self.qk_nope_head_dim + self.v_head_dim), self.kv_lora_rank)
        if weight.dtype != act_dtype or tuple(weight.shape) != shape or self.quant_config is not None:
            raise UnsupportedFeature(
                f"mla.cpu: the up-projection of {self.layer_name} is {tuple(weight.shape)} of {weight.dtype}. bi_patch "
                "covers unquantized weights of the model's dtype only. Set BI_PATCH=0"
            )
        made = latent.absorb(weight, self.num_heads, self.qk_nope_head_dim, self.v_head_dim)
        held = getattr(self, _ABSORBED, None)
        if held is None:
            setattr(self, _ABSORBED, made)
        else:
            held.take(made)
        mla_attention.set_default_quant_scales(self, register_buffer=False)

    return process_weights_after_loading


def absorb_again(model) -> None:
    """Pack the up-projections of every MLA layer of a model again, after its weights were written."""
    for layer in model.modules():
        if getattr(layer, _ABSORBED, None) is not None:
            layer.process_weights_after_loading(layer.kv_b_proj.weight.dtype)


def _build(original):
    """The metadata of a step: the requests as they come, without the split into prompts and generated tokens."""

    @functools.wraps(original)
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        common = common_attn_metadata
        if common.causal is not True:
            raise UnsupportedFeature("mla.cpu: on CPU, bi_patch covers only causal MLA. Set BI_PATCH=0")
        made = unsplit(self, common)
        made.seq_lens, made.block_table = common.seq_lens, common.block_table_tensor
        return made

    return build


def _forward(original):
    """MLAAttention.forward_impl: the absorbed form for every token."""
    from bi_patch.ops.cpu import latent

    @functools.wraps(original)
    def forward_impl(self, q, k_c_normed, k_pe, kv_cache, attn_metadata, output, output_scale=None, *args, **kwargs):
        if attn_metadata is None:  # warm-up
            return output.fill_(0)
        if output_scale is not None or any(given is not None for given in (*args, *kwargs.values())):
            raise UnsupportedFeature(
                "mla.cpu: on CPU, bi_patch covers neither quantized outputs nor replicated queries of MLA. Set "
                "BI_PATCH=0"
            )
        tokens = attn_metadata.num_actual_tokens
        latent.attention(
            output[:tokens],
            q[:tokens],
            getattr(self, _ABSORBED),
            kv_cache,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            self.scale,
        )
        return output

    return forward_impl


def _store(original):
    """AMXMLAImpl.do_kv_cache_update: store fp32 and fp16, too, which vLLM's kernel does not take."""

    @functools.wraps(original)
    def do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale):
        import torch
        from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

        store = original if kv_cache.dtype == torch.bfloat16 else CPUMLAImpl.do_kv_cache_update
        return store(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale)

    return do_kv_cache_update


def _seam(name: str, module: str, qualname: str, close, how: str, **given) -> Seam:
    return Seam(
        name=f"mla.cpu_{name}",
        targets=(Target(module, qualname),),
        close=close,
        why="prompts and generated tokens go through two forms or two kernels, whose bits differ. The longest request "
        "decides how decode splits keys, and the chunk decides how prefill does",
        how=how,
        until="upstream's CPU MLA has one form, and splits keys by position",
        causes=(3, 4, 6, 7, 9),
        **given,
    )


SEAMS = (
    _seam(
        "init",
        _LAYER,
        "MLAAttention.__init__",
        _init,
        "bi_patch refuses by name what the bundled kernel does not cover",
    ),
    _seam(
        "weights",
        _LAYER,
        "MLAAttention.process_weights_after_loading",
        _weights,
        "the up-projections are packed for the bundled GEMM, which has one order for every number of tokens",
    ),
    _seam(
        "build",
        _LAYER,
        "MLACommonMetadataBuilder.build",
        _build,
        "vLLM does not split a step into prompts and generated tokens",
    ),
    _seam(
        "build_amx",
        _AMX,
        "AMXMLAMetadataBuilder.build",
        _build,
        "vLLM does not split a step into prompts and generated tokens, and computes no number of splits",
    ),
    Seam(
        name="mla.cpu_store",
        targets=(Target(_AMX, "AMXMLAImpl.do_kv_cache_update"),),
        close=_store,
        why="with AMX, vLLM stores latents of bf16 only, and an fp32 or fp16 model stops at its first request",
        how="other latents are stored by the code of vLLM's backend for CPUs without AMX",
        until="upstream's AMX_MLA stores every type that its own check accepts",
        required=False,
    ),
    _seam(
        "forward",
        _LAYER,
        "MLAAttention.forward_impl",
        _forward,
        "one bundled kernel computes every token in the absorbed form. It splits keys at fixed positions and merges "
        "the parts in ascending order",
        serves=("MLAAttention", "MultiHeadLatentAttentionWrapper"),
        op="bi_patch.ops.cpu.latent",
    ),
)
