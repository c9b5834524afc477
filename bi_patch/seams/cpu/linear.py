"""Unquantized linear layers and the language-model head: each takes a certified route."""

import functools

from bi_patch.seams import active, leaves, library
from bi_patch.seams.cpu import leaves as parts
from bi_patch.seams.model import Seam, Target


def _dispatch(original):
    """dispatch_cpu_unquantized_gemm, which gives a layer its GEMM: give the layer a certified route instead."""

    @functools.wraps(original)
    def dispatch_cpu_unquantized_gemm(layer, remove_weight):
        from bi_patch.ops.cpu import linear

        weight = layer.weight
        if weight.ndim == 3 and weight.shape[1] == 1:
            return None  # a causal convolution: bi_patch's kernel reads the weight as it is
        if weight.is_meta or weight.ndim != 2:
            return original(layer, remove_weight)
        if active.leaves and leaves.is_row_parallel(layer):
            parts.serve(layer, remove_weight)
            return None
        bias = getattr(layer, "bias", None)
        bias_kept = None if bias is None else bias.detach().clone()
        held = weight.detach()
        original(layer, remove_weight)
        # Upstream's GEMM is the vendor candidate. Upstream may have converted the layer's bias to fp32 for this GEMM.
        layer.cpu_linear = linear.route(held, bias_kept, layer.cpu_linear, layer, active.cache, library.vllm())

    return dispatch_cpu_unquantized_gemm


SEAMS = (
    Seam(
        name="linear.cpu_dispatch",
        targets=(Target("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm"),),
        close=_dispatch,
        why="the size of the weight decides which CPU GEMM runs, and some GEMMs split or block K by the number of rows",
        how="every linear layer and the language-model head take the fastest route whose bits equal the bundled GEMM's",
        until="upstream's CPU GEMMs have one order for every number of rows",
        causes=(1, 17),
        serves=("LinearBase", "ParallelLMHead", "LogitsProcessor"),
        op="bi_patch.ops.cpu.linear",
    ),
)
