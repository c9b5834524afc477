"""Faults in code that only the CUDA engine runs: vLLM's own kernels and choices in place of bi_patch's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from bi_patch.tools.faults import parts
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


def vllm_norm(engine: LocalEngine):
    """vLLM's own RMSNorm kernel, whose block has 1024 threads below 256 rows and 256 threads from 256 rows on."""

    def make(name, layer, held):
        def forward(x, residual=None):
            weight, eps = layer.weight.data, layer.variance_epsilon
            if residual is None:
                out = torch.empty_like(x)
                torch.ops._C.rms_norm(out, x.contiguous(), weight, eps)
                return out
            x, residual = x.clone(), residual.clone()
            torch.ops._C.fused_add_rms_norm(x, residual, weight, eps)
            return x, residual

        return forward

    return parts.each_norm(engine, make)


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
        "RMSNorm kernel of vLLM",
        2,
        vllm_norm.__doc__,
        "batch size",
        vllm_norm,
        (CUDA,),
        "norm",
        seam={"cuda": "norm.cuda_rms"},
    ),
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
