"""Experts with packed weights of 4 bits: which kernels a row certificate covers, and how to call them.

`PackedExperts` (packed_products.py), `PackedFloatExperts` (mxfp4.py) and `PackedNvFp4Experts` (nvfp4_experts.py) are
bi_patch's. Layers that the first two do not cover keep what vLLM takes in upstream's mode. `TritonWNA16Experts`
dequantizes in the tile, adds K in ascending order in one accumulator, and gets one tile for every number of rows
(moe.cuda_default). `HummingIndexedExperts` (of the package humming-kernels) takes its batch-invariant schedules: one
block of K for every number of rows, and no parts.
"""

from bi_patch.seams import library

OWN, FLOATS, NVFP4, _HUMMING = "PackedExperts", "PackedFloatExperts", "PackedNvFp4Experts", "HummingIndexedExperts"
# bi_patch's own, with the seam that brings each.
OWNED = {OWN: "packed_products.cuda_kernel", FLOATS: "mxfp4.cuda_kernel", NVFP4: "nvfp4_experts.cuda_kernel"}
KINDS = (*OWNED, "TritonWNA16Experts", _HUMMING)


def kernel(module):
    """vLLM's kernel of a layer of experts, None if it has none."""
    return getattr(getattr(getattr(module, "quant_method", None), "moe_kernel", None), "fused_experts", None)


def covers(module) -> bool:
    """Whether a row certificate covers a layer's experts."""
    return type(kernel(module)).__name__ in KINDS


def checks(model, dtype):
    """A RowCheck for each layer of experts of a model on one of KINDS: the layer's own kernel is called."""
    from bi_patch.ops.row_checks import ROWS, RowCheck

    for module in model.modules():
        if not covers(module):
            continue
        config = module.moe_config
        count, hidden, top_k = config.num_experts, config.hidden_dim, config.experts_per_token
        yield RowCheck(
            "cuda.packed_experts",
            f"{_name(module, config)} {str(dtype).removeprefix('torch.')}",
            ROWS,
            _inputs(count, hidden, top_k, dtype),
            _run(module),
            indexes=True,  # the sorted rows of each expert
            library=library.humming() if type(kernel(module)).__name__ == _HUMMING else "",
        )


def _name(module, config) -> str:
    """The kernel, the sizes and the kind of weights, in words."""
    quantization = kernel(module).quant_config
    held = [("bias", getattr(module, "w13_bias", None)), ("zero points", getattr(quantization, "w1_zp", None))]
    shapes = (f"{name} {tuple(p.shape)} {p.dtype}" for name, p in sorted(module.named_parameters(recurse=False)))
    return " ".join(
        [
            type(kernel(module)).__name__,
            type(module.quant_method).__name__,
            f"E={config.num_experts} K={config.hidden_dim} top{config.experts_per_token}",
            config.activation.value,
            *(name for name, value in held if value is not None),
            *shapes,
        ]
    ).replace("torch.", "")


def _inputs(count: int, hidden: int, top_k: int, dtype):
    """make(rows, generator): rows [rows, hidden], weights [rows, top_k] fp32 and experts [rows, top_k] int32."""

    def make(rows, generator):
        import torch

        x = torch.randn((rows, hidden), generator=generator, device=generator.device).to(dtype)
        scores = torch.rand((rows, count), generator=generator, device=generator.device)
        weights, ids = scores.softmax(-1).topk(top_k, dim=-1)
        return x, weights, ids.to(torch.int32)

    return make


def _run(module):
    def run(x, weights, ids):
        from vllm.config import get_current_vllm_config
        from vllm.forward_context import set_forward_context

        with set_forward_context(None, get_current_vllm_config()):
            out = module.quant_method.apply(
                layer=module,
                x=x,
                topk_weights=weights,
                topk_ids=ids,
                shared_experts=None,
                shared_experts_input=None,
            )
        return (out.clone(),)  # the output may lie in a workspace that the next call writes

    return run
