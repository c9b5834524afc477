"""LoRA of experts on CUDA: the bundled kernels add adapters to the two products of vLLM's Triton experts.

The base is computed as in an engine without LoRA: the same kernel with the same certified tiles, and the same sum over
a token's experts. Between them, each row's adapter is added in place; rows without an adapter are not touched.
"""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Seam, Target

_RELEASES = ">=0.33"
_LAYER = "vllm.lora.layers.fused_moe"
_PUNICA = "vllm.lora.punica_wrapper.punica_gpu"
_ALIGN = "PunicaWrapperGPU.moe_lora_align_block_size"


def _refuse(what: str) -> None:
    raise UnsupportedFeature(
        f"expert_lora.cuda: bi_patch does not cover adapters of experts with {what}. "
        "Leave --enable-lora out, or set BI_PATCH=0"
    )


def _examined(original):
    """FusedMoEWithLoRA.create_lora_weights: refuse every kind of experts that nobody has examined."""

    @functools.wraps(original)
    def create_lora_weights(self, max_loras, lora_config, model_config=None):
        from bi_patch.ops.cuda import expert_lora

        if what := _unexamined(self, lora_config):
            _refuse(what)
        expert_lora.register()
        return original(self, max_loras, lora_config, model_config)

    return create_lora_weights


def _unexamined(layer, lora_config) -> str:
    """What of a layer of experts nobody has examined, "" for nothing. layer: FusedMoEWithLoRA."""
    config, experts = layer.moe_config, layer._moe_kernel.fused_experts
    kernel = type(experts).__name__
    held = experts.quant_config
    activation = getattr(config.activation, "value", config.activation)
    asked = {
        f"another kernel than vLLM's Triton experts ({kernel})": kernel != "TritonExperts",
        "quantized weights": held.quant_dtype is not None or held.weight_quant_dtype is not None,
        f"the activation {activation}": activation != "silu" or not config.is_act_and_mul,
        "a bias": config.has_bias or held.w1_bias is not None,
        "a limit of the activation": config.swiglu_limit is not None,
        "a router that weights the input": bool(layer.base_layer.routed_experts.apply_router_weight_on_input),
        "several ranks": layer.tp_size > 1 or layer.use_ep,
        "shared experts": layer._shared_experts is not None,
        "a factor shared by all experts (--enable-moe-shared-loras)": lora_config.enable_moe_shared_loras,
        "checkpoints of two layouts (--enable-mixed-moe-lora-format)": lora_config.enable_mixed_moe_lora_format,
        "sharded adapters (--fully-sharded-loras)": lora_config.fully_sharded_loras,
        "a stream of their own (VLLM_LORA_ENABLE_DUAL_STREAM)": layer._lora_stream is not None,
    }
    return ", ".join(name for name, true in asked.items() if true)


def _fused(original):
    """FusedMoE3DWithLoRA.create_lora_weights: refuse models whose checkpoints fuse w1 and w3 of all experts."""

    @functools.wraps(original)
    def create_lora_weights(self, *args, **kwargs):
        _refuse("weights that the checkpoint fuses over all experts (FusedMoE3DWithLoRA)")

    return create_lora_weights


def _naive(rows: int, experts: int, loras: int) -> bool:
    """Whether each row has a tile of its own, which changes no bit: few rows share an adapter and an expert."""
    return 2 * rows <= experts * loras


def _first(original):
    """PunicaWrapperGPU.add_lora_w13: add the adapters of gate and up. Returns what `add_lora_w2` will get."""

    @functools.wraps(original)
    def add_lora_w13(
        self, y, x, lora_a_stacked, lora_b_stacked, topk_ids, topk_weights, expert_map, w1, w2, num_tokens, top_k_num,
        max_loras, adapter_enabled, local_num_experts, top_k, num_slices, fully_sharded, use_tuned_config,
        add_inputs=True, token_lora_mapping=None,
    ):  # fmt: skip
        from bi_patch.ops.cuda import expert_lora

        _plain(fully_sharded, add_inputs, expert_map, token_lora_mapping)
        meta = self.token_mapping_meta.meta_args(num_tokens, self.lora_config.specialize_active_lora)
        if meta[5].item():
            return None, None, None, None
        alone = _naive(topk_ids.numel(), local_num_experts, max_loras)
        mapping, rows, experts, padded = self.moe_lora_align_block_size(
            topk_ids, num_tokens, expert_lora.rows_of_a_block(), local_num_experts, max_loras, adapter_enabled,
            naive_block_assignment=alone,
        )  # fmt: skip
        _add(self, y, x, lora_a_stacked, lora_b_stacked, rows, experts, padded, mapping, adapter_enabled, None, top_k)
        return rows, experts, padded, mapping

    return add_lora_w13


def _second(original):
    """PunicaWrapperGPU.add_lora_w2: add the adapters of down, times the router's weights."""

    @functools.wraps(original)
    def add_lora_w2(
        self, y, x, lora_a_stacked, lora_b_stacked, topk_weights, sorted_token_ids_lora, expert_ids_lora,
        num_tokens_post_padded_lora, token_lora_mapping, num_tokens, w1, w2, top_k_num, max_loras, adapter_enabled,
        top_k, fully_sharded, tp_rank, use_tuned_config, add_inputs=True,
    ):  # fmt: skip
        _plain(fully_sharded, add_inputs, None, None)
        if token_lora_mapping is None:  # no row has an adapter
            return
        _add(
            self, y, x, lora_a_stacked, lora_b_stacked, sorted_token_ids_lora, expert_ids_lora,
            num_tokens_post_padded_lora, token_lora_mapping, adapter_enabled, topk_weights, top_k,
        )  # fmt: skip

    return add_lora_w2


def _plain(sharded, add_inputs, expert_map, mapping) -> None:
    if sharded or not add_inputs or expert_map is not None or mapping is not None:
        _refuse("shards, several ranks, or a stream of their own")


def _add(wrapper, y, x, a, b, rows, experts, padded, mapping, enabled, weights, top_k) -> None:
    from bi_patch.ops.cuda import expert_lora

    meta = wrapper.token_mapping_meta.meta_args(len(mapping), wrapper.lora_config.specialize_active_lora)
    slots, active = meta[4], meta[6]
    expert_lora.add(
        y.view(-1, y.shape[-1]), x, a, b, rows, experts, padded, mapping, slots, enabled, active, weights, top_k
    )  # fmt: skip


def _seam(name: str, module: str, qualname: str, close, why: str, how: str, **given) -> Seam:
    return Seam(
        name=f"expert_lora.{name}",
        targets=(Target(module, qualname, _RELEASES),),
        close=close,
        why=why,
        how=how,
        until="upstream's LoRA has one order at stock's speed",
        causes=(10, 34),
        on_import=True,
        **given,
    )


_TILES = (
    "the tiles of adapters depend on the number of rows, and large ranks split K by the number of rows and add the "
    "parts by atomics"
)
_ORDER = "K is cut into chunks of a length that K decides, whose sums are added in ascending order, in fixed tiles"
_NOBODY = "nobody has examined adapters of other experts"
_NAMED = "they are refused by name"

SEAMS = (
    _seam("cuda_layer", _LAYER, "FusedMoEWithLoRA.create_lora_weights", _examined, _NOBODY, _NAMED),
    _seam("cuda_fused", _LAYER, "FusedMoE3DWithLoRA.create_lora_weights", _fused, _NOBODY, _NAMED),
    _seam(
        "cuda_first",
        _PUNICA,
        "PunicaWrapperGPU.add_lora_w13",
        _first,
        _TILES,
        _ORDER,
        serves=("FusedMoEWithLoRA",),
        op="bi_patch.ops.cuda.expert_lora",
        relies=(
            _ALIGN,
            "vllm.model_executor.layers.fused_moe.experts.triton_moe:TritonExperts.apply",
            "vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin:LoRAExpertsMixin.apply_w13_lora",
            "vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin:LoRAExpertsMixin.apply_w2_lora",
        ),
    ),
    _seam(
        "cuda_second",
        _PUNICA,
        "PunicaWrapperGPU.add_lora_w2",
        _second,
        _TILES,
        _ORDER,
        op="bi_patch.ops.cuda.expert_lora",
    ),
)
