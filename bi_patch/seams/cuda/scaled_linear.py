"""Seams of linear layers with 8-bit floats: products by a certified route, rows quantized one by one."""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import library
from bi_patch.seams.cuda import quantized
from bi_patch.seams.model import Policy, Seam, Target, Variable

_GROUP = 128


def _op():
    import torch

    from bi_patch.ops.cuda import scaled_linear

    scaled_linear.define_op()
    return torch.ops.bi_patch.scaled_linear


def _by_row(original):
    """CutlassFP8ScaledMMLinearKernel.apply_scaled_mm: call the certified route. torch.compile sees one op."""
    product = _op()

    def apply_scaled_mm(self, *, A, B, out_dtype, As, Bs, bias, output_shape):
        import torch

        weight = B.t()
        n, k = weight.shape
        wide = self.logical_output_size
        if k > A.shape[1]:  # vLLM pads weights to multiples of 16
            A = torch.nn.functional.pad(A, (0, k - A.shape[1]))
        if bias is not None and n > bias.shape[0]:
            bias = torch.nn.functional.pad(bias, (0, n - bias.shape[0]))
        out = product(A, weight, As, Bs, bias, 0, out_dtype, self.quant_fp8.static)
        if n > wide:
            out = out[:, :wide].contiguous()
        return out.view(*output_shape[:-1], wide)

    return apply_scaled_mm


def _loaded(original):
    """CutlassFP8ScaledMMLinearKernel.process_weights_after_loading: give each row of the weight its scale."""

    @functools.wraps(original)
    def process_weights_after_loading(self, layer):
        from vllm.model_executor.utils import replace_parameter

        original(self, layer)
        weight_name, scale_name, *_ = self.layer_param_names
        n, scale = getattr(layer, weight_name).shape[1], getattr(layer, scale_name)
        if scale.numel() == 1 < n:
            replace_parameter(layer, scale_name, scale.data.reshape(1).repeat(n))

    return process_weights_after_loading


def _by_block(original):
    """apply_block_scaled_mm: call the certified route."""
    product = _op()

    def apply_block_scaled_mm(self, A, B, As, Bs):
        return product(A, B, As, Bs, None, _GROUP, self.config.out_dtype, False)

    return apply_block_scaled_mm


# By the class of vLLM's kernel: the elements of K in a group, 0 for scales by row.
_KERNELS = {
    "CutlassFP8ScaledMMLinearKernel": 0,
    "DeepGemmFp8BlockScaledMMKernel": _GROUP,
    "CutlassFp8BlockScaledMMKernel": _GROUP,
    "TritonFp8BlockScaledMMKernel": _GROUP,
}


def keep_products(model) -> None:
    """Keep the products of both scales of each layer whose checkpoint has the activations' scale. New weights change
    the scales, and this makes the kept products anew."""
    from bi_patch.ops.cuda.scaled_linear import keep

    for _, layer, kernel in quantized.layers(model, _KERNELS):
        if _is_static(kernel) and _weights_stay():
            weight, weight_scale, x_scale, *_ = kernel.layer_param_names
            keep(getattr(layer, x_scale), getattr(layer, weight_scale), getattr(layer, weight).shape[1])


def _is_static(kernel) -> bool:
    return not _KERNELS[type(kernel).__name__] and kernel.quant_fp8.static


def problems(model):
    """A Problem for every linear layer of a model with 8-bit floats. Raises UnsupportedFeature for blocks of another
    size than 128 x 128."""
    from bi_patch.ops.cuda.scaled_linear import Problem, hand

    hand(None)
    hand(None, static=True)
    keep_products(model)
    for name, layer, kernel in quantized.layers(model, _KERNELS):
        if type(kernel).__name__ == "DeepGemmFp8BlockScaledMMKernel":
            hand(_deep_gemm())
        group = _KERNELS[type(kernel).__name__]
        weight = layer.weight
        n, k = weight.shape if group else weight.shape[::-1]
        static = _is_static(kernel)
        if static:
            hand(_cutlass(), static=True)
        if group:
            _check_blocks(name, kernel)
        # With groups, vLLM adds the bias to the rounded product.
        bias = not group and getattr(layer, "bias", None) is not None and not getattr(layer, "skip_bias_add", False)
        yield Problem(n, k, kernel.config.out_dtype, bias, group, static)
        if bias and getattr(layer, "tp_size", 1) > 1:  # in a sum over ranks, only the first rank adds the bias
            yield Problem(n, k, kernel.config.out_dtype, False, group, static)
        if group and hasattr(layer, "deep_gemm_warmup_provider"):
            del layer.deep_gemm_warmup_provider  # DeepGEMM would compile kernels that never serve


@functools.cache
def _deep_gemm():
    """DeepGEMM's product: for up to 64 rows it has one kernel for each N and K, and it compiles at its first call."""
    import torch
    from vllm.utils.deep_gemm import fp8_gemm_nt

    from bi_patch.ops.cuda.scaled_linear import Kernel

    def run(x, weight, x_scale, weight_scale, dtype):
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=dtype, device=x.device)
        fp8_gemm_nt((x, x_scale), (weight, weight_scale), out, is_deep_gemm_e8m0_used=False)  # scales as they are
        return out

    return Kernel(run, 64, f"DeepGEMM of vLLM {library.vllm()}")


_MOST_BY_CUTLASS = 512  # rows: a certificate times other kernels than cuBLASLt's up to here


def _weights_stay() -> bool:
    """Whether each layer's weights have addresses of their own. With --offload-group-size, layers take turns in buffers
    that they share."""
    from vllm.model_executor.offloader import get_offloader

    return type(get_offloader()).__name__ == "NoopOffloader"


@functools.cache
def _cutlass():
    """vLLM's CUTLASS product. Its tile, and which of the two scales multiplies first, depend on M. With ones as the
    scales of rows, the order of the scales changes no bit."""
    import torch
    from vllm import _custom_ops  # noqa: F401, registers the operator

    from bi_patch.ops.cuda.scaled_linear import Kernel

    def run(x, weight, x_scale, weight_scale, dtype):
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=dtype, device=x.device)
        torch.ops._C.cutlass_scaled_mm(out, x, weight.t(), x_scale[:1], weight_scale.view(-1, 1), None)
        return out

    return Kernel(run, _MOST_BY_CUTLASS, f"CUTLASS of vLLM {library.vllm()}")


def _check_blocks(name, kernel) -> None:
    shape = kernel.weight_group_shape
    if (shape.row, shape.col) != (_GROUP, _GROUP):
        raise UnsupportedFeature(
            f"linear.cuda_blocks: {name} has FP8 blocks of {shape.row} x {shape.col}, and bi_patch has kernels for "
            "128 x 128 only. Use another checkpoint, or set BI_PATCH=0"
        )


def quantizers(model):
    """Of each layer with 8-bit floats: its form in words, K, and how it quantizes: x [M, K] -> (rows, scales), or
    (rows,) if the checkpoint has the one scale."""
    for _, layer, kernel in quantized.layers(model, _KERNELS):
        group, quantize = _KERNELS[type(kernel).__name__], kernel.quant_fp8
        k = layer.weight.shape[1 if group else 0]
        scale = getattr(layer, "input_scale", None)
        form = f"groups of {group}" if group else "static" if scale is not None else "by row"
        form += " powers of two" if group and quantize.use_ue8m0 else ""
        yield f"{form} K={k}", k, functools.partial(_quantized, quantize, scale)


def _quantized(quantize, scale, x):
    """The outputs of a quantizer that have a row for each row of x. scale: the checkpoint's, or None."""
    rows, scales = quantize.forward_cuda(x, scale=scale)
    return (rows, scales) if scale is None else (rows,)


def _custom_op(config) -> None:
    """Quantize rows by vLLM's own kernel in compiled code, too, and fuse it into no other kernel."""
    model = config.model_config
    if model is None or getattr(model, "quantization", None) is None:
        return
    held = config.compilation_config.custom_ops
    if "-quant_fp8" in held:
        raise UnsupportedFeature(
            "scaled_linear.cuda_quantizer: custom_ops has -quant_fp8, and code that torch.compile makes instead has "
            "no certificate. Leave it out, or set BI_PATCH=0"
        )
    if "all" not in held and "+quant_fp8" not in held:
        held.append("+quant_fp8")
    for name in ("fuse_norm_quant", "fuse_act_quant", "fuse_attn_quant"):
        if hasattr(config.compilation_config.pass_config, name):
            setattr(config.compilation_config.pass_config, name, False)


_SCALED_MM = "vllm.model_executor.kernels.linear.scaled_mm"
_WHY = "vLLM's FP8 kernels choose tiles, a swapped form and the order of the two scales by the number of rows"
_HOW = (
    "the product runs on the fastest kernel with a certificate: cuBLASLt without split-K, the bundled Triton GEMM, or "
    "DeepGEMM for up to 64 rows of blocks, or vLLM's CUTLASS for up to 512 rows of static activations, in one order "
    "for every number of rows"
)
_UNTIL = "upstream's mode runs FP8 linears on fast kernels (https://github.com/vllm-project/vllm/issues/27433)"


def _product(name: str, module: str, qualname: str, close, **attributed) -> Seam:
    return Seam(
        name=f"scaled_linear.cuda_{name}",
        targets=(Target(f"{_SCALED_MM}.{module}", qualname, ">=0.33"),),
        close=close,
        why=_WHY,
        how=_HOW,
        until=_UNTIL,
        causes=(1, 23),
        op="bi_patch.ops.cuda.scaled_linear",
        **attributed,
    )


SEAMS = (
    _product("fp8", "cutlass", "CutlassFP8ScaledMMLinearKernel.apply_scaled_mm", _by_row),
    _product("fp8_deep_gemm", "deep_gemm", "DeepGemmFp8BlockScaledMMKernel.apply_block_scaled_mm", _by_block),
    _product("fp8_cutlass", "cutlass", "CutlassFp8BlockScaledMMKernel.apply_block_scaled_mm", _by_block),
    _product("fp8_triton", "triton", "TritonFp8BlockScaledMMKernel.apply_block_scaled_mm", _by_block),
    Seam(
        name="scaled_linear.cuda_fp8_scales",
        targets=(
            Target(f"{_SCALED_MM}.cutlass", "CutlassFP8ScaledMMLinearKernel.process_weights_after_loading", ">=0.33"),
        ),
        close=_loaded,
        why="the certified products take one scale for each row of the weight",
        how="a scale of the whole weight is repeated for each row, which changes no value",
        until="bi_patch's own kernel takes one scale for all rows",
    ),
)

VARIABLES = (
    Variable(
        name="scaled_linear.cuda_fp8_flashinfer",
        variable="VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER",
        value="0",
        why="below 32 rows FlashInfer multiplies and rounds FP8 blocks, from 32 rows on DeepGEMM",
    ),
)

POLICIES = (
    Policy(
        name="scaled_linear.cuda_quantizer",
        apply=_custom_op,
        why="code that torch.compile makes for quantization rounds in other places than vLLM's own kernel",
    ),
)
