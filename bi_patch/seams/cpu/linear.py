"""Seams of unquantized linear layers and the language-model head."""

import functools

from bi_patch.seams import active, library
from bi_patch.seams.model import Seam, Target


def _dispatch(original):
    """dispatch_cpu_unquantized_gemm: gives a layer its GEMM; ours gives it a certified route."""

    @functools.wraps(original)
    def dispatch_cpu_unquantized_gemm(layer, remove_weight):
        from bi_patch.ops.cpu import linear

        weight = layer.weight
        if weight.is_meta or weight.ndim != 2:
            return original(layer, remove_weight)
        bias = getattr(layer, "bias", None)
        bias_kept = None if bias is None else bias.detach().clone()
        held = weight.detach()
        original(layer, remove_weight)
        # Upstream's choice is the vendor candidate; it may have widened the layer's bias to fp32 for it.
        layer.cpu_linear = linear.route(held, bias_kept, layer.cpu_linear, layer, active.cache, library.vllm())

    return dispatch_cpu_unquantized_gemm


SEAMS = (
    Seam(
        name="linear.cpu_dispatch",
        targets=(Target("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm"),),
        close=_dispatch,
        why="the CPU GEMM is chosen by weight size and splits or blocks K by the number of rows",
        how="every linear, lm_head included, gets the fastest route that is certified against the bundled GEMM",
        until="upstream's CPU GEMMs keep one order for every number of rows",
        causes=(1, 17),
        serves=("LinearBase", "ParallelLMHead", "LogitsProcessor"),
        op="bi_patch.ops.cpu.linear",
    ),
)
