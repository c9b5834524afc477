"""Faults in code that only the CUDA engine runs: vLLM's own kernels and choices in place of bi_patch's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from bi_patch.tools.faults.base import CUDA, FP8, Fault
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
)
