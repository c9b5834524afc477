"""Experts in NVFP4 on a bundled kernel: `PackedNvFp4Experts`, in which activations stay bf16.

The kernel, and what is around the kernel, are those of integers (packed_products.py). The weights are floats e2m1 with
scales in e4m3, and each expert has one fp32 number, by which the fp32 sum is multiplied. On Hopper stock vLLM leaves
activations unquantized, too, also for checkpoints that name NVFP4 activations.
"""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.cuda import packed_products
from bi_patch.seams.cuda.packed_experts import NVFP4
from bi_patch.seams.model import Seam, Target

_GROUP = 16
_ALONE = ("pcp_size", "dp_size", "ep_size", "sp_size")


def _chosen(original):
    """select_nvfp4_moe_backend: `PackedNvFp4Experts`, with the backend of vLLM that takes 16-bit activations. A layer
    that the bundled kernel does not cover is refused."""

    @functools.wraps(original)
    def select_nvfp4_moe_backend(config, weight_key, activation_key):
        odd = _odd(config) or _unsupported(config, weight_key, activation_key)
        if odd:
            raise UnsupportedFeature(
                f"nvfp4_experts.cuda_kernel: bi_patch has no certified order for experts in NVFP4 with {odd}. Leave "
                "the option out, use another checkpoint, or set BI_PATCH=0"
            )
        from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend

        return NvFp4MoeBackend.MARLIN, own()

    return select_nvfp4_moe_backend


def _odd(config) -> str:
    """What the bundled kernel does not cover in a layer, or what asks for another kernel, in words; "" for a covered
    layer. config: vLLM's FusedMoEConfig."""
    import torch
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from bi_patch.kernels.packing import covers
    from bi_patch.ops.cuda import packed_experts

    ranks = config.moe_parallel_config
    inner, hidden = config.intermediate_size_per_partition, config.hidden_dim
    sizes = (2 * inner, hidden), (hidden, inner)
    found = {
        f"--moe-backend {config.moe_backend}": config.moe_backend != "auto",
        "LoRA": config.is_lora_enabled,
        "expert parallelism": ranks.use_ep or ranks.enable_eplb,
        "several ranks that do not split each expert": any(getattr(ranks, size) != 1 for size in _ALONE),
        f"activations in {config.in_dtype}": config.in_dtype != torch.bfloat16,
        "another activation than SwiGLU": config.activation != MoEActivation.SILU,
        "a clamped or scaled SwiGLU": any(
            getattr(config, f"swiglu_{n}") is not None for n in ("limit", "alpha", "beta")
        ),
        "a bias": config.has_bias,
        f"sizes {inner} and {hidden}, which must be multiples of 128": not all(
            covers(n, k, 4, _GROUP, True) for n, k in sizes
        ),
        "another GPU than Hopper": not packed_experts.served(),
    }
    return next((words for words, there in found.items() if there), "")


def _unsupported(config, weight_key, activation_key) -> str:
    """Why vLLM's own checks do not take PackedNvFp4Experts (activation, number of experts, format of rows), or ""."""
    from vllm.model_executor.layers.fused_moe import modular_kernel

    formats = modular_kernel.FusedMoEActivationFormat
    batched = config.moe_parallel_config.use_batched_activation_format
    asked = formats.BatchedExperts if batched else formats.Standard
    taken, reason = own().is_supported_config(own(), config, weight_key, activation_key, asked)
    return "" if taken else str(reason)


@functools.cache
def own() -> type:
    """PackedNvFp4Experts, one of vLLM's kernels for experts. Weights: uint8 [E, N, K / 2], as `pack` makes them."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static

    from bi_patch.ops.cuda.packed_experts import Problem

    class PackedNvFp4Experts(packed_products.own()):
        @staticmethod
        def _supports_quant_scheme(weight_key, activation_key):
            return weight_key == kNvfp4Static and activation_key in (None, kNvfp4Dynamic)

        def bi_patch_products(self, w1, w2):
            """The Problem of each of the two products."""
            if self._problems is None:
                self._problems = tuple(
                    Problem(w.shape[1], 2 * w.shape[2], self.moe_config.in_dtype, False, _GROUP, False, True)
                    for w in (w1, w2)
                )
            return self._problems

        def bi_patch_wholes(self):
            return self.g1_alphas, self.g2_alphas

    assert PackedNvFp4Experts.__name__ == NVFP4
    return PackedNvFp4Experts


def _packed(original):
    """convert_to_nvfp4_moe_kernel_format: pack the checkpoint's floats for the bundled kernel, once. Scales of
    activations are dropped, as for vLLM's kernels of 16-bit activations."""

    @functools.wraps(original)
    def convert_to_nvfp4_moe_kernel_format(
        nvfp4_backend, layer, w13, w13_scale, w13_scale_2, a13_scale, w2, w2_scale, w2_scale_2, a2_scale, *args,
        **kwargs,
    ):  # fmt: skip
        if getattr(getattr(layer, "quant_method", None), "experts_cls", None) is not own():
            return original(
                nvfp4_backend, layer, w13, w13_scale, w13_scale_2, a13_scale, w2, w2_scale, w2_scale_2, a2_scale,
                *args, **kwargs,
            )  # fmt: skip
        try:
            (w13, w13_scale, w13_scale_2), (w2, w2_scale, w2_scale_2) = (
                pack(*each) for each in ((w13, w13_scale, w13_scale_2), (w2, w2_scale, w2_scale_2))
            )
        except ValueError as error:
            raise UnsupportedFeature(
                f"nvfp4_experts.cuda_weights: bi_patch's kernel does not take this checkpoint's experts: {error}. Use "
                "another checkpoint, or set BI_PATCH=0"
            ) from error
        return w13, w13_scale, w13_scale_2, None, w2, w2_scale, w2_scale_2, None

    return convert_to_nvfp4_moe_kernel_format


_AT_ONCE = 1 << 27  # floats that are unpacked at once, a byte each


def pack(words, scale, whole):
    """Experts' floats for the bundled kernel: data uint8 [E, N, K / 2], scales uint8 [E, K / 16, N], and numbers of
    experts fp32 [E].

    words: uint8 [E, N, K / 2], two floats in a byte, the first in the lower bits. scale: e4m3 [E, N, K / 16]. whole:
    fp32 [E]; a weight is its float times both. Raises ValueError for scales that the kernel does not hold.
    """
    import torch

    from bi_patch.kernels import packing

    experts, n, half = words.shape
    data = torch.empty((experts, n, half), dtype=torch.uint8, device=words.device)
    scales = torch.empty((experts, 2 * half // _GROUP, n), dtype=torch.uint8, device=words.device)
    wholes = torch.empty(experts, dtype=torch.float32, device=words.device)
    step = max(1, _AT_ONCE // (n * half * 2))
    for at in range(0, experts, step):
        part = slice(at, at + step)
        held = words[part]
        q = torch.stack((held & 15, held >> 4), -1).flatten(-2)
        made = packing.pack_scaled_experts(q, scale[part], whole[part])
        data[part], scales[part], wholes[part] = made.data.view(held.shape), made.scale, made.whole
    return data, scales, wholes


_ORACLE = "vllm.model_executor.layers.fused_moe.oracle.nvfp4"
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_COPIES = tuple(
    f"{_QUANTIZATION}.{name}"
    for name in (
        "compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_nvfp4",
        "modelopt",
        "online.nvfp4",
        "quark.quark_moe",
    )
)
_UNTIL = "vLLM's kernels for experts in NVFP4 have one order for every number of rows at stock's speed"

SEAMS = (
    Seam(
        name="nvfp4_experts.cuda_kernel",
        targets=(Target(_ORACLE, "select_nvfp4_moe_backend", ">=0.33", _COPIES),),
        close=_chosen,
        why="Marlin cuts K into parts by the number of rows",
        how="experts run on a bundled kernel, which unpacks in registers and keeps the order of 16-bit linears. What "
        "the kernel does not cover is refused by name",
        until=_UNTIL,
        causes=(1,),
        op="bi_patch.ops.cuda.packed_experts",
        relies=(
            f"{_ORACLE}:make_nvfp4_moe_quant_config",
            f"{_ORACLE}:make_nvfp4_moe_kernel",
        ),
    ),
    Seam(
        name="nvfp4_experts.cuda_weights",
        targets=(
            Target(
                _ORACLE,
                "convert_to_nvfp4_moe_kernel_format",
                ">=0.33",
                (*_COPIES, "vllm.models.muse_spark.nvidia.muse_moe_runner"),
            ),
        ),
        close=_packed,
        why="the checkpoint's floats have another layout than the bundled kernel's",
        how="the floats are packed once, when the weights are loaded",
        until=_UNTIL,
    ),
)
