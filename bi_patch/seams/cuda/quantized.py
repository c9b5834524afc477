"""The kernels of vLLM that quantized linear layers of a model run on. Those without a route are refused by name."""

from bi_patch.errors import UnsupportedFeature

INT8, NVFP4 = "CutlassInt8ScaledMMLinearKernel", "HummingNvFp4LinearKernel"
PACKED_NVFP4 = "PackedNvFp4LinearKernel"  # bi_patch's own (nvfp4)
# By the class of vLLM's kernel: the module of seams that replaces its product, or that certifies it as it is.
KERNELS = {
    "CutlassFP8ScaledMMLinearKernel": "scaled_linear",
    "DeepGemmFp8BlockScaledMMKernel": "scaled_linear",
    "CutlassFp8BlockScaledMMKernel": "scaled_linear",
    "TritonFp8BlockScaledMMKernel": "scaled_linear",
    "MacheteLinearKernel": "packed_linear",
    "MarlinLinearKernel": "packed_linear",
    PACKED_NVFP4: "packed_linear",
    INT8: "rows",
    NVFP4: "rows",
}


def layers(model, kinds):
    """(name, layer, vLLM's kernel) of each quantized linear layer whose kernel's class is in `kinds`."""
    return (found for found in _all(model) if type(found[2]).__name__ in kinds)


def check(model) -> None:
    """Raise UnsupportedFeature if a linear layer or a head is quantized, and its kernel is none of KERNELS. No head may
    have a kernel that is certified as it is, or have NVFP4 weights."""
    for name, layer, kernel in _all(model):
        name_of = type(kernel).__name__
        kind = KERNELS.get(name_of)
        if kind is None or (kind == "rows" or name_of == PACKED_NVFP4) and _is_head(layer):
            found = type(layer.quant_method).__name__ if kernel is None else name_of
            raise UnsupportedFeature(
                f"linear.cuda_quantized: {name} runs on {found}, and bi_patch has no certified order for it. Leave out "
                "--linear-backend, use another checkpoint, or set BI_PATCH=0"
            )


def refuse_update(model) -> None:
    """Raise UnsupportedFeature if a model with quantized layers gets new weights."""
    held = [layer for _, layer, _ in _all(model)]
    held += [layer for layer in model.modules() if _is_quantized(layer)]
    if held:
        raise UnsupportedFeature(
            f"linear.cuda_update: no evidence covers new weights in a quantized {type(held[0]).__name__}. Start a new "
            "engine with the new weights"
        )


def _is_quantized(layer) -> bool:
    held = (getattr(layer, name, None) for name in ("weight", "w13_weight"))
    return any(w is not None and (w.element_size() == 1 or not w.is_floating_point()) for w in held)


def _is_head(layer) -> bool:
    return any(kind.__name__ == "ParallelLMHead" for kind in type(layer).__mro__)


def _all(model):
    """(name, layer, vLLM's kernel or None) of every linear layer and language-model head that is not unquantized."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    plain = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    for name, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if not (isinstance(layer, LinearBase) or _is_head(layer)) or method is None or isinstance(method, plain):
            continue
        inner = getattr(getattr(method, "scheme", None), "linear_method", None)  # AutoRound's
        owners = (method, getattr(layer, "scheme", None), inner)
        held = [getattr(owner, kind, None) for owner in owners for kind in ("fp8_linear", "kernel")]
        yield name, layer, next((kernel for kernel in held if kernel is not None), None)
