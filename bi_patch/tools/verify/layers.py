"""Finds the layers of a running model by kind: linears, norms and experts. Reads a linear's width and weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bi_patch.tools.verify import eighths
from bi_patch.tools.verify.engine import LocalEngine
from bi_patch.tools.verify.runner import model_runner

# (x [..., K], bias [N] or None) -> y [..., N]
Product = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


def model(engine: LocalEngine) -> torch.nn.Module:
    """The model of an engine in this process. Raises NotTraceable where the model runs in other processes."""
    return model_runner(engine).get_model()


def linears(engine: LocalEngine) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every unquantized linear and the head: (path, layer). A pooling model computes no logits, so its head is no
    linear."""
    pools = hasattr(model(engine), "pooler")
    for name, module in model(engine).named_modules():
        method = getattr(module, "quant_method", None)
        if pools and type(method).__name__ == "UnquantizedEmbeddingMethod":
            continue
        if type(method).__name__ in ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"):
            if type(module).__name__ != "VocabParallelEmbedding" or module is getattr(model(engine), "lm_head", None):
                if not _convolution(module):
                    yield name, module


def _convolution(module: torch.nn.Module) -> bool:
    """Whether a layer only holds the weight [channels, 1, width] of a causal convolution. Stock vLLM may pack it."""
    return getattr(module, "weight", torch.empty(0)).ndim == 3 or hasattr(module, "_cpu_unpacked_conv_weight")


def quantized(engine: LocalEngine) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """Every quantized linear with a route on CPU, or with packed weights, INT8 or FP8 on CUDA: (path, layer, its scheme
    in words, e.g. "W4A8 groups of 128")."""
    if engine.info.platform != "cpu":
        for name, module in model(engine).named_modules():
            kernel = packed_kernel(module)
            if kernel is not None:
                yield name, module, f"W{kernel.config.weight_type.size_bits}A16 groups of {kernel.bi_patch_group}"
            elif scheme := _integers(module) or eighths.scheme(module):
                yield name, module, scheme
        return
    from bi_patch.ops.cpu import quantized as routes

    for name, module in model(engine).named_modules():
        if routes.has_route(module):
            yield name, module, routes.scheme(module)


def packed_kernel(module: torch.nn.Module):
    """vLLM's kernel object of a linear whose weights bi_patch packed on CUDA, else None."""
    return next((kernel for kernel in _kernels(module) if hasattr(kernel, "bi_patch_group")), None)


def _kernels(module: torch.nn.Module) -> Iterator[object]:
    """vLLM's kernel objects of a linear."""
    for owner in (getattr(module, "quant_method", None), getattr(module, "scheme", None)):
        if (kernel := getattr(owner, "kernel", None)) is not None:
            yield kernel


def _integers(module: torch.nn.Module) -> str:
    """The scheme of a linear with weights and activations in INT8 on CUDA, "" for others."""
    for kernel in _kernels(module):
        if type(kernel).__name__ == "CutlassInt8ScaledMMLinearKernel":
            return f"W8A8 cutlass{' static' if kernel.config.is_static_input_scheme else ''}"
    return ""


def norms(engine: LocalEngine) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every RMSNorm: (path, layer)."""
    for name, module in model(engine).named_modules():
        if type(module).__name__ == "RMSNorm":
            yield name, module


def experts(engine: LocalEngine) -> Iterator[tuple[torch.nn.Module, object]]:
    """Every layer that holds routed experts: (layer, the kernel object whose `apply` runs the experts)."""
    for module in model(engine).modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None and hasattr(module, "w13_weight"):
            yield module, kernel.fused_experts


def width(layer: torch.nn.Module) -> int:
    """K of a linear on this rank."""
    return getattr(layer, "input_size_per_partition", None) or getattr(layer, "input_size", 0) or layer.embedding_dim


def weight(layer: torch.nn.Module, product: Product | None = None) -> torch.Tensor:
    """The weight [N, K] in the layer's dtype. A packed weight is read as the layer's product with the identity: exact.

    product: the function that computes the layer's product, by default the layer's own method.
    """
    held = getattr(layer, "weight", None)
    if held is not None and held.ndim == 2 and held.numel() and held.is_cuda:
        return held.detach()
    dtype = held.dtype if held is not None else torch.get_default_dtype()
    product = product or (lambda x, bias: layer.quant_method.apply(layer, x, bias))
    with torch.inference_mode():
        return product(torch.eye(width(layer), dtype=dtype), None).T.contiguous()
