"""gpt-oss's experts in MXFP4 on a bundled kernel: `PackedFloatExperts`, which vLLM takes for covered layers.

The kernel, and what is around the kernel, are those of integers (packed_products.py). The weights are floats e2m1 with
powers of two as scales. K of gpt-oss is not a multiple of 128: the packed weights have zeros there, and rows of
activations end.
"""

import functools
import logging

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.cuda import packed_products
from bi_patch.seams.cuda.packed_experts import FLOATS
from bi_patch.seams.model import Seam, Target
from bi_patch.seams.overlay import with_globals

_log = logging.getLogger("vllm.bi_patch")
_GROUP = 32
_ALONE = ("tp_size", "pcp_size", "dp_size", "ep_size", "sp_size")


def _chosen(original):
    """GptOssMxfp4MoEMethod.__init__: for layers that the bundled kernel covers, `PackedFloatExperts`, with a backend of
    vLLM that keeps the sizes and takes 16-bit activations. Others keep what vLLM takes."""

    @functools.wraps(original)
    def __init__(self, moe):
        if not (_fits(moe) and _supported(moe)):
            return original(self, moe)
        from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend

        made = Mxfp4MoeBackend.B12X_MXFP4_BF16, own()
        return with_globals(original, select_mxfp4_moe_backend=lambda moe: made)(self, moe)

    return __init__


def _fits(config) -> bool:
    """Whether the bundled kernel covers a layer, and no option asks for another one. config: vLLM's FusedMoEConfig."""
    import torch
    from vllm import envs
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.oracle import mxfp4 as oracle

    from bi_patch.kernels.packing import covers_float_experts
    from bi_patch.ops.cuda import packed_experts

    ranks = config.moe_parallel_config
    if config.moe_backend != "auto" or config.is_lora_enabled or ranks.use_ep or ranks.enable_eplb:
        return False
    if any(getattr(ranks, size) != 1 for size in _ALONE) or config.in_dtype != torch.bfloat16:
        return False
    # Options that let vLLM's kernels round activations.
    if oracle._resolve_activation_key(None) is not None or envs.VLLM_HUMMING_INPUT_QUANT_CONFIG:
        return False
    inner, hidden = config.intermediate_size_per_partition, config.hidden_dim
    covered = covers_float_experts(2 * inner, hidden) and covers_float_experts(hidden, inner)
    return covered and config.activation == MoEActivation.SWIGLUOAI and packed_experts.served()


def _supported(config) -> bool:
    """Whether vLLM's own checks take PackedFloatExperts: activation, ranks, number of experts, format of rows."""
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp4Static

    asked = modular_kernel.FusedMoEActivationFormat.Standard
    return own().is_supported_config(own(), config, kMxfp4Static, None, asked)[0]


@functools.cache
def own() -> type:
    """PackedFloatExperts, one of vLLM's kernels for experts. Weights: uint8 [E, N, K / 2], as `pack` makes them."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp4Static

    from bi_patch.ops.cuda.packed_experts import Problem

    class PackedFloatExperts(packed_products.own()):
        @staticmethod
        def _supports_quant_scheme(weight_key, activation_key):
            return weight_key == kMxfp4Static and activation_key is None

        def bi_patch_products(self, w1, w2):
            """The Problem of each of the two products."""
            if self._problems is None:
                depths = self.moe_config.hidden_dim, self.moe_config.intermediate_size_per_partition
                held = (w1, depths[0], self.w1_bias), (w2, depths[1], self.w2_bias)
                self._problems = tuple(
                    Problem(w.shape[1], k, self.moe_config.in_dtype, bias is not None, _GROUP, False, True)
                    for w, k, bias in held
                )
            return self._problems

    assert PackedFloatExperts.__name__ == FLOATS
    return PackedFloatExperts


def _packed(original):
    """convert_gpt_oss_weight_to_mxfp4_moe_kernel_format: pack the checkpoint's floats for the bundled kernel, once. A
    layer whose exponents the kernel does not hold gets what vLLM takes."""

    @functools.wraps(original)
    def convert_gpt_oss_weight_to_mxfp4_moe_kernel_format(
        mxfp4_backend, layer, w13_weight, w2_weight, w13_weight_scale, w2_weight_scale, w13_bias=None, w2_bias=None,
        w13_input_scale=None, w2_input_scale=None, _cache_permute_indices=None,
    ):  # fmt: skip
        if getattr(getattr(layer, "quant_method", None), "experts_cls", None) is own():
            try:
                w13, w13_scale = pack(w13_weight.data, w13_weight_scale.data)
                w2, w2_scale = pack(w2_weight.data, w2_weight_scale.data)
                return w13, w2, w13_scale, w2_scale, w13_bias, w2_bias
            except ValueError as error:
                mxfp4_backend = _leave(layer, error)
        return original(
            mxfp4_backend, layer, w13_weight, w2_weight, w13_weight_scale, w2_weight_scale, w13_bias, w2_bias,
            w13_input_scale, w2_input_scale, _cache_permute_indices,
        )  # fmt: skip

    return convert_gpt_oss_weight_to_mxfp4_moe_kernel_format


def _leave(layer, reason: ValueError):
    """Give a layer vLLM's own kernel in place of `PackedFloatExperts`. Returns vLLM's backend.

    Raises UnsupportedFeature if vLLM has no kernel, or one with other sizes of weights, or if the layer serves already:
    captured graphs read the kernel's weights.
    """
    if getattr(layer.quant_method, "moe_kernel", None) is not None:
        raise UnsupportedFeature(
            f"mxfp4.cuda_weights: new weights do not fit the kernel that serves: {reason}. Start an engine with the "
            "new weights, or set BI_PATCH=0"
        ) from reason
    from vllm.model_executor.layers.fused_moe.oracle import mxfp4 as oracle

    config = layer.moe_config
    sizes = config.hidden_dim, config.intermediate_size_per_partition
    try:
        backend, experts = oracle.select_mxfp4_moe_backend(config)
        if oracle.mxfp4_round_up_hidden_size_and_intermediate_size(backend, *sizes) != sizes:
            raise ValueError(f"{backend.value} has other sizes of weights")
    except (ValueError, NotImplementedError) as error:
        raise UnsupportedFeature(
            f"mxfp4.cuda_weights: bi_patch's kernel does not take this checkpoint's experts: {reason}. vLLM has no "
            f"other kernel here: {error}. Install the package humming-kernels, or set BI_PATCH=0"
        ) from reason
    _log.warning("bi_patch: experts in MXFP4 take vLLM's kernel %s: %s", experts.__name__, reason)
    layer.quant_method.mxfp4_backend, layer.quant_method.experts_cls = backend, experts
    return backend


_AT_ONCE = 1 << 27  # floats that are unpacked at once, a byte each


def pack(words, exponent):
    """Experts' floats for the bundled kernel: data uint8 [E, N, K' / 2] and scales uint8 [E, K' / 32, N]. K' is K up to
    the next multiple of 128.

    words: uint8 [E, N, K / 2], two floats in a byte, the first in the lower bits. exponent: e8m0 as uint8
    [E, N, K / 32]. Raises ValueError for exponents that the kernel does not hold.
    """
    import torch

    from bi_patch.kernels import packing

    experts, n, half = words.shape
    padded = -(-2 * half // packing.BLOCK_K) * packing.BLOCK_K
    data = torch.empty((experts, n, padded // 2), dtype=torch.uint8, device=words.device)
    scales = torch.empty((experts, padded // _GROUP, n), dtype=torch.uint8, device=words.device)
    step = max(1, _AT_ONCE // (n * padded))
    for at in range(0, experts, step):
        held = words[at : at + step]
        q = torch.stack((held & 15, held >> 4), -1).flatten(-2)
        made = packing.pack_float_experts(q, exponent[at : at + step].contiguous())
        data[at : at + step] = made.data.view(len(held), n, -1)
        scales[at : at + step] = made.scale
    return data, scales


_QUANTIZATION = "vllm.model_executor.layers.quantization"
_UNTIL = "vLLM's kernels for experts in MXFP4 have one order for every number of rows at stock's speed"

SEAMS = (
    Seam(
        name="mxfp4.cuda_kernel",
        targets=(Target(f"{_QUANTIZATION}.mxfp4", "GptOssMxfp4MoEMethod.__init__", ">=0.33"),),
        close=_chosen,
        why="Marlin cuts K into parts by the number of rows, and upstream's mode needs the package humming-kernels",
        how="experts run on a bundled kernel, which unpacks in registers and keeps the order of 16-bit linears. What "
        "the kernel does not cover stays with vLLM's kernels of upstream's mode, as do experts over several ranks",
        until=_UNTIL,
        causes=(1,),
        op="bi_patch.ops.cuda.packed_experts",
        relies=(
            "vllm.model_executor.layers.fused_moe.oracle.mxfp4:_resolve_activation_key",
            "vllm.model_executor.layers.fused_moe.oracle.mxfp4:mxfp4_round_up_hidden_size_and_intermediate_size",
            "vllm.model_executor.layers.fused_moe.oracle.mxfp4:make_mxfp4_moe_quant_config",
            "GptOssMxfp4MoEMethod._setup_kernel",
        ),
    ),
    Seam(
        name="mxfp4.cuda_weights",
        targets=(
            Target(
                "vllm.model_executor.layers.fused_moe.oracle.mxfp4",
                "convert_gpt_oss_weight_to_mxfp4_moe_kernel_format",
                ">=0.33",
                (f"{_QUANTIZATION}.mxfp4", f"{_QUANTIZATION}.quark.quark_moe"),
            ),
        ),
        close=_packed,
        why="the checkpoint's floats have another layout than the bundled kernel's",
        how="the floats are packed once, when the weights are loaded",
        until=_UNTIL,
    ),
)
