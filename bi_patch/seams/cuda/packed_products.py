"""Experts with packed weights of 4 bits on a bundled kernel: `PackedExperts`, which vLLM takes for covered layers.

vLLM's Triton experts are around it: their sorted rows, activation, and sum over a token's experts. The two products run
on the bundled kernel (bi_patch.ops.cuda.packed_experts).
"""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.cuda import packed_experts_weights as integers
from bi_patch.seams.cuda.packed_experts import OWNED, kernel
from bi_patch.seams.model import Seam, Target
from bi_patch.seams.overlay import with_globals


def _chosen(original):
    """select_wna16_moe_backend: for layers that the bundled kernel covers, vLLM's Triton layout with `PackedExperts`.
    A backend that the user names keeps its own kernel."""

    @functools.wraps(original)
    def select_wna16_moe_backend(
        config, weight_key, quant_config, may_have_zp, may_have_bias, allow_tile_padding=False
    ):
        if _fits(config, quant_config) and _supported(config, weight_key):
            from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend

            return WNA16MoEBackend.TRITON, own()
        return original(config, weight_key, quant_config, may_have_zp, may_have_bias, allow_tile_padding)

    return select_wna16_moe_backend


def _fits(config, quant_config) -> bool:
    """Whether the bundled kernel covers a layer's weights. config: vLLM's FusedMoEConfig."""
    import torch

    from bi_patch.kernels.packing import covers
    from bi_patch.ops.cuda import packed_experts

    group = integers.group(quant_config)
    if group is None or config.moe_backend != "auto" or config.is_lora_enabled:
        return False
    inner, hidden = config.intermediate_size_per_partition, config.hidden_dim
    first = inner * (2 if config.is_act_and_mul else 1)
    sizes = ((first, hidden), (hidden, inner))
    covered = all(covers(n, k, 4, group) and k % group == 0 for n, k in sizes)
    return covered and config.in_dtype in (torch.bfloat16, torch.float16) and packed_experts.served()


def _supported(config, weight_key) -> bool:
    """Whether vLLM's own checks take PackedExperts: activation, ranks, number of experts, format of rows."""
    from vllm.model_executor.layers.fused_moe import modular_kernel

    formats = modular_kernel.FusedMoEActivationFormat
    batched = config.moe_parallel_config.use_batched_activation_format
    asked = formats.BatchedExperts if batched else formats.Standard
    return own().is_supported_config(own(), config, weight_key, None, asked)[0]


def _packed(original):
    """convert_to_wna16_moe_kernel_format: pack the checkpoint's integers for the bundled kernel, once."""

    @functools.wraps(original)
    def convert_to_wna16_moe_kernel_format(
        backend, layer, quant_config, input_dtype, w13, w2, w13_scale, w2_scale,
        w13_qzeros=None, w2_qzeros=None, w13_bias=None, w2_bias=None,
    ):  # fmt: skip
        if getattr(layer.quant_method, "experts_cls", None) is not own():
            return original(
                backend, layer, quant_config, input_dtype, w13, w2, w13_scale, w2_scale,
                w13_qzeros, w2_qzeros, w13_bias, w2_bias,
            )  # fmt: skip
        given = (w13, w13_scale, w13_qzeros), (w2, w2_scale, w2_qzeros)
        (w13, w13_scale, w13_zero), (w2, w2_scale, w2_zero) = (integers.pack(*each, quant_config) for each in given)
        return w13, w2, w13_scale, w2_scale, w13_zero, w2_zero, None, None, w13_bias, w2_bias

    return convert_to_wna16_moe_kernel_format


def _made(original):
    """make_wna16_moe_kernel: allow PackedExperts where vLLM allows the class that it extends."""

    @functools.wraps(original)
    def make_wna16_moe_kernel(moe_quant_config, moe_config, experts_cls, *args, **kwargs):
        make = with_globals(original, TritonWNA16Experts=own()) if experts_cls is own() else original
        return make(moe_quant_config, moe_config, experts_cls, *args, **kwargs)

    return make_wna16_moe_kernel


@functools.cache
def own() -> type:
    """PackedExperts, one of vLLM's kernels for experts. Weights: uint8 [E, N, K / 2], as packed_experts_weights.pack
    makes them."""
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonWNA16Experts
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
    from vllm.model_executor.layers.fused_moe.utils import _resize_cache

    from bi_patch.kernels.cuda.packed import Rows
    from bi_patch.kernels.packing import Packed
    from bi_patch.ops.cuda import activation as gated
    from bi_patch.ops.cuda import packed_experts

    class PackedExperts(TritonWNA16Experts):
        def apply(
            self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
            a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input,
        ):  # fmt: skip
            if self.post_gemm2_hook is not None or self._lora_context is not None:
                raise UnsupportedFeature(
                    "packed_products.cuda_kernel: bi_patch's kernel for experts of 4 bits takes no adapters, and sums "
                    "a token's experts itself. Leave --enable-lora out, or set BI_PATCH=0"
                )
            count, tokens, n, k, top_k = self.moe_problem_size(hidden_states, w1, w2, topk_ids)
            inner, ids = self.adjust_N_for_activation(n, activation), tokens * top_k
            first, second = self.bi_patch_products(w1, w2)
            # The caches of vLLM's kernel. The output may lie in workspace13.
            up = _resize_cache(workspace2, (ids, n))
            active = _resize_cache(workspace13, (ids, inner))
            down = _resize_cache(workspace2, (ids, k))
            experts = count if expert_map is None else global_num_experts
            weights = None if apply_router_weight_on_input else topk_weights.float().contiguous().view(-1)

            def align(form):
                # Rows of other ranks' experts get no place. The sum over a token's experts leaves them out, too.
                return moe_align_block_size(
                    topk_ids, 8 * form.tiles, experts, expert_map, ignore_invalid_experts=expert_map is not None
                )

            form = packed_experts.form(first, ids, experts)
            rows = align(form)
            wholes = self.bi_patch_wholes()
            data = Packed(w1, self.w1_scale, self.w1_zp, 4, first.group, wholes[0])
            packed_experts.product(hidden_states, data, Rows(*rows, top_k, ids), self.w1_bias, form, up)
            if activation.value != "swigluoai" or not gated.swigluoai_and_mul(active, up):
                self.activation(activation, active, up)
            then = packed_experts.form(second, ids, experts)
            if then.tiles != form.tiles:
                rows = align(then)
            data = Packed(w2, self.w2_scale, self.w2_zp, 4, second.group, wholes[1])
            packed_experts.product(active, data, Rows(*rows, 1, ids, weights), self.w2_bias, then, down)
            self.moe_sum(down.view(tokens, top_k, k), output, topk_ids, expert_map)

        def bi_patch_products(self, w1, w2):
            """The Problem of each of the two products."""
            if self._problems is None:
                held = (w1, self.w1_scale, self.w1_zp, self.w1_bias), (w2, self.w2_scale, self.w2_zp, self.w2_bias)
                self._problems = tuple(
                    packed_experts.Problem(
                        n, 2 * half, scale.dtype, bias is not None, 2 * half // scale.shape[1], zero is not None
                    )
                    for (_, n, half), scale, zero, bias in ((w.shape, *rest) for w, *rest in held)
                )
            return self._problems

        def bi_patch_wholes(self):
            """Of each product, the fp32 number of each expert that multiplies its sums, or None."""
            return None, None

        _problems = None

    return PackedExperts


def problems(model):
    """The Problem of each product of a model's experts on the bundled kernel."""
    for module in model.modules():
        if type(kernel(module)).__name__ in OWNED:
            yield from kernel(module).bi_patch_products(module.w13_weight, module.w2_weight)


_ORACLE = "vllm.model_executor.layers.fused_moe.oracle.int_wna16"
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_COPIES = tuple(
    f"{_QUANTIZATION}.{name}"
    for name in (
        "auto_awq",
        "auto_gptq",
        "compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16",
        "moe_wna16",
        "quark.quark_moe",
    )
)


def _seam(name: str, qualname: str, close, why: str, how: str, **given) -> Seam:
    return Seam(
        name=f"packed_products.{name}",
        targets=(Target(_ORACLE, qualname, ">=0.33", _COPIES),),
        close=close,
        why=why,
        how=how,
        until="vLLM's kernels for experts of 4 bits have one order for every number of rows at stock's speed",
        **given,
    )


SEAMS = (
    _seam(
        "cuda_kernel",
        "select_wna16_moe_backend",
        _chosen,
        "Marlin cuts K into parts by the number of rows, and upstream's mode takes one untuned tile for every batch, "
        "or dequantizes AWQ's experts while loading",
        "experts run on a bundled kernel, which dequantizes in registers and keeps the order of 16-bit linears. What "
        "the kernel does not cover stays with vLLM's kernels of upstream's mode",
        causes=(1, 10),
        op="bi_patch.ops.cuda.packed_experts",
        relies=(
            "vllm.model_executor.layers.fused_moe.experts.triton_moe:TritonWNA16Experts",
            "vllm.model_executor.layers.fused_moe.moe_align_block_size:moe_align_block_size",
        ),
    ),
    _seam(
        "cuda_weights",
        "convert_to_wna16_moe_kernel_format",
        _packed,
        "the checkpoint's integers have another layout than the bundled kernel's",
        "the integers are packed once, when the weights are loaded",
    ),
    _seam(
        "cuda_allowed",
        "make_wna16_moe_kernel",
        _made,
        "vLLM allows a fixed list of kernels for such experts",
        "bi_patch's kernel is allowed, too",
    ),
)
