"""Gated delta nets on CUDA: the bundled kernels run a request's tokens one after the other, in one order."""

from __future__ import annotations

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import active
from bi_patch.seams.model import Seam, Target

_RELEASES = ">=0.33"
_GDN = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
_LAYER = f"{_GDN}.QwenGatedDeltaNetAttention"


def _backend(original):
    """get_mamba_attn_backend: let in gated delta nets."""

    def get_mamba_attn_backend(mamba_type):
        if mamba_type.name != "GDN_ATTN":
            return original(mamba_type)
        held = mamba_type.get_class()
        if not held.supports_batch_invariance():
            before = vars(held).get("supports_batch_invariance")
            held.supports_batch_invariance = classmethod(lambda cls: True)
            active.at_disarm(lambda: _give_back(held, before))
        return held

    return get_mamba_attn_backend


def _give_back(held, before) -> None:
    if before is None:
        del held.supports_batch_invariance
    else:
        held.supports_batch_invariance = before


def _core(original):
    """QwenGatedDeltaNetAttention._forward_core: the bundled kernels, for prompts and decodes alike."""
    from bi_patch.ops.cuda import recurrent

    def _forward_core(self, mixed_qkv, b, a, core_attn_out):
        from vllm.forward_context import get_forward_context

        held = get_forward_context().attn_metadata
        meta = held.get(self.prefix) if isinstance(held, dict) else None
        if meta is None:
            return
        tokens = meta.num_actual_tokens
        slots = meta.non_spec_state_indices_tensor.contiguous()
        starts = meta.non_spec_query_start_loc[: len(slots) + 1]
        fresh = None if meta.has_initial_state is None else ~meta.has_initial_state[: len(slots)]
        weight = self.conv1d.weight
        recurrent.gated_delta_net(
            core_attn_out[:tokens],
            mixed_qkv[:tokens],
            weight.view(weight.size(0), weight.size(-1)),
            a[:tokens],
            b[:tokens],
            self.A_log,
            self.dt_bias,
            self.kv_cache[0],
            self.kv_cache[1],
            starts,
            slots,
            fresh,
            self.num_k_heads // self.tp_size,
        )

    return _forward_core


def _checkpoints(original):
    """QwenGatedDeltaNetAttention.get_kv_cache_spec: a step ends where a state is cached."""

    @functools.wraps(original)
    def get_kv_cache_spec(self, vllm_config):
        import torch
        from vllm.model_executor.layers.mamba.abstract import MambaBase
        from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

        sizes = _unknown_sizes(self)
        if sizes:
            raise UnsupportedFeature(f"recurrent.cuda_states: bi_patch does not cover {self.prefix} with {sizes}")
        dtypes = self.get_state_dtype()
        if dtypes[1] != torch.float32 or dtypes[0] != vllm_config.model_config.dtype or is_conv_state_dim_first():
            raise UnsupportedFeature(
                f"recurrent.cuda_states: bi_patch does not cover {self.prefix} with states kept in {dtypes}. Use "
                "--mamba-ssm-cache-dtype float32 --mamba-cache-dtype auto, and unset VLLM_SSM_CONV_STATE_LAYOUT"
            )
        return MambaBase.get_kv_cache_spec(self, vllm_config)

    return get_kv_cache_spec


def _unknown_sizes(layer) -> str:
    """What the kernels do not compute of a layer, in words, else ""."""
    keys, values = layer.head_k_dim, layer.head_v_dim
    if keys < 16 or keys & (keys - 1) or values % 32:
        return f"heads of {keys} keys and {values} values; a power of two and a multiple of 32 work"
    if layer.conv_kernel_size != 4 or layer.activation != "silu":
        return f"a convolution over {layer.conv_kernel_size} tokens with {layer.activation}; 4 and silu work"
    return ""


def _no_alignment(original):
    """QwenGatedDeltaNetAttention.get_prefill_checkpoint_alignment: the kernels write no state inside a prompt."""

    def get_prefill_checkpoint_alignment(self):
        return None

    return get_prefill_checkpoint_alignment


def _gated(original):
    """RMSNormGated.forward_cuda: the bundled kernel, one program a row."""
    from bi_patch.ops.cuda import recurrent

    recurrent.define_op()

    def forward_cuda(self, x, z=None):
        if z is None or not self.norm_before_gate or self.group_size not in (None, x.shape[-1]):
            raise UnsupportedFeature(
                "recurrent.cuda_gated_norm: bi_patch covers RMSNorm of whole rows with a gate after it"
            )
        return recurrent.gated_rms_norm(x, z, self.weight.data, self.eps, self.activation == "sigmoid")

    return forward_cuda


def _attention(original):
    """Qwen3NextAttention.__init__: norm, rotate and gate by the operations that other models use."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.use_fused_qk_norm_rope_gate = False

    return __init__


def _seam(name: str, module: str, qualname: str, close, how: str, copies=(), serves=()) -> Seam:
    return Seam(
        name=name,
        targets=(Target(module, qualname, _RELEASES, copies),),
        close=close,
        why="the stock kernels start their chunks where an engine step starts, and decode by other kernels",
        how=how,
        until="upstream's kernels place their chunks by position, and decode has the bits of prefill",
        causes=(24,),
        serves=serves,
        op="bi_patch.ops.cuda.recurrent",
    )


SEAMS = (
    _seam(
        "recurrent.cuda_backend",
        "vllm.v1.attention.selector",
        "get_mamba_attn_backend",
        _backend,
        "gated delta nets may start",
        ("vllm.model_executor.layers.mamba.abstract",),
    ),
    _seam(
        "recurrent.cuda_gated_delta_net",
        _GDN,
        "QwenGatedDeltaNetAttention._forward_core",
        _core,
        "the bundled kernels take one token after the other, in prompts and decodes, and keep the state in fp32",
        serves=("QwenGatedDeltaNetAttention",),
    ),
    _seam(
        "recurrent.cuda_states",
        _GDN,
        "QwenGatedDeltaNetAttention.get_kv_cache_spec",
        _checkpoints,
        "a step ends where a state is cached, and other dtypes of states are refused",
    ),
    _seam(
        "recurrent.cuda_alignment",
        _GDN,
        "QwenGatedDeltaNetAttention.get_prefill_checkpoint_alignment",
        _no_alignment,
        "no layer offers to write states inside a prompt",
    ),
    _seam(
        "recurrent.cuda_gated_norm",
        "vllm.model_executor.layers.layernorm",
        "RMSNormGated.forward_cuda",
        _gated,
        "one program norms a row and multiplies by its gate",
        serves=("RMSNormGated",),
    ),
    _seam(
        "recurrent.cuda_attention",
        "vllm.model_executor.models.qwen3_next",
        "Qwen3NextAttention.__init__",
        _attention,
        "norm, rotation and gate run by the operations that other models use",
    ),
)
