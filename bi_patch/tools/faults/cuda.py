"""Faults in code that only the CUDA engine runs: vLLM's own kernels and choices in place of bi_patch's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from bi_patch.tools.faults.base import CUDA, FEW, FP8, PACKED, Fault
from bi_patch.tools.verify import layers
from bi_patch.tools.verify.engine import LocalEngine
from bi_patch.tools.verify.runner import model_runner, replaced


@contextlib.contextmanager
def heuristic_splits(engine: LocalEngine) -> Iterator[None]:
    """FlashAttention chooses the number of KV splits itself (num_splits 0)."""
    context = model_runner(engine).vllm_config.compilation_config.static_forward_context

    def wrap(held):
        def forward(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs):
            if attn_metadata is not None:
                attn_metadata = dataclasses.replace(attn_metadata, max_num_splits=0, scheduler_metadata=None)
            return held(layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs)

        return forward

    with contextlib.ExitStack() as stack:
        for layer in context.values():
            if hasattr(layer, "impl"):
                stack.enter_context(replaced(layer.impl, "forward", wrap))
        yield


@contextlib.contextmanager
def tensor_scale(engine: LocalEngine) -> Iterator[None]:
    """All rows of a step share one FP8 scale, by vLLM's own kernel for dynamic scales per tensor."""

    def shared(x, *_, **__):
        from vllm import _custom_ops

        return _custom_ops.scaled_fp8_quant(x)

    with contextlib.ExitStack() as stack:
        for layer in layers.model(engine).modules():
            kernel = getattr(getattr(layer, "quant_method", None), "fp8_linear", None)
            if kernel is not None:
                stack.enter_context(replaced(kernel, "quant_fp8", lambda held: shared))
        yield


_SPLITS = 4


def _split(engine: LocalEngine, order) -> contextlib.AbstractContextManager[None]:
    """Products of packed weights for few rows are sums of parts of K, in fp32. order: of the parts."""
    from bi_patch.kernels.packing import Packed
    from bi_patch.ops.cuda import packed_linear

    def make(kernel):
        def wrap(held):
            def apply_weights(layer, x, bias=None):
                flat = x.reshape(-1, x.shape[-1])
                if flat.shape[0] > FEW:
                    return held(layer, x, bias)
                data, scale, zero = kernel._get_weight_params(layer)
                bits = kernel.config.weight_type.size_bits
                packed = Packed(data, scale, zero, bits, kernel.bi_patch_group)
                halves = zip(flat.chunk(_SPLITS, 1), packed_linear.dequantize(packed).chunk(_SPLITS, 1), strict=True)
                parts_ = [a.float() @ b.float().T for a, b in halves]
                first, *rest = (parts_[i] for i in order(_SPLITS))
                for part in rest:
                    first += part
                if bias is not None:
                    first += bias
                return first.to(x.dtype).view(*x.shape[:-1], -1)

            return apply_weights

        return wrap

    stack = contextlib.ExitStack()
    for layer in layers.model(engine).modules():
        kernel = layers.packed_kernel(layer)
        if kernel is not None:
            stack.enter_context(replaced(kernel, "apply_weights", make(kernel)))
    return stack


def atomic_packed(engine: LocalEngine):
    """The parts of K of a product for few rows are added in the order in which they are ready, as atomics do."""
    return _split(engine, lambda count: torch.randperm(count, generator=_arrival).tolist())


_arrival = torch.Generator().manual_seed(
    27
)  # when a part is ready: another order for each product, the same in each run


FAULTS = (
    Fault(
        "num_splits 0",
        3,
        heuristic_splits.__doc__,
        "batch size",
        heuristic_splits,
        (CUDA,),
        "attn",
        seam={"cuda": "attention.cuda_backend"},
    ),
    Fault(
        "one dynamic FP8 scale for a step",
        11,
        tensor_scale.__doc__,
        "co-batch contents",
        tensor_scale,
        (CUDA,),
        "proj",
        "fp8_quant",
        model=FP8,
    ),
    Fault(
        "parts of K of packed weights added as they arrive",
        10,
        atomic_packed.__doc__,
        "batch size",
        atomic_packed,
        (CUDA,),
        "proj",
        seam={"cuda": "packed_linear.cuda_machete"},
        emulated=(CUDA,),
        model=PACKED,
    ),
)
