"""Seams of linear layers with packed weights of 4 or 8 bits: AWQ, GPTQ, compressed-tensors W4A16 and W8A16, NVFP4."""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.cuda import nvfp4, quantized
from bi_patch.seams.model import Seam, Target


def _loaded(original):
    """process_weights_after_loading: pack the checkpoint's integers for bi_patch's kernels, once."""

    @functools.wraps(original)
    def process_weights_after_loading(self, layer):
        config = self.config
        k, n = config.partition_weight_shape
        bits = config.weight_type.size_bits
        _check(type(layer).__name__, self, n, k)
        q, scale, zero = _integers(self, layer, n, k, bits)
        from vllm.model_executor.utils import replace_parameter

        from bi_patch.kernels.packing import pack

        packed = pack(q, scale, zero, bits)
        replace_parameter(layer, self.w_q_name, packed.data)
        replace_parameter(layer, self.w_s_name, packed.scale)
        if zero is not None:
            replace_parameter(layer, self.w_zp_name, packed.zero)
        self.bi_patch_group = packed.group

    return process_weights_after_loading


def _integers(kernel, layer, n: int, k: int, bits: int):
    """A loaded layer's integers [N, K], scales [N, K / group] and zero points, or None."""
    import torch

    shifts = torch.arange(0, 32, bits, device=getattr(layer, kernel.w_q_name).device, dtype=torch.int32)
    words = _laid(getattr(layer, kernel.w_q_name), 0)  # [K / 8 or 4, N] int32
    q = ((words.t()[:, :, None] >> shifts) & (2**bits - 1)).to(torch.uint8).reshape(n, -1)
    scale = _laid(getattr(layer, kernel.w_s_name)).t().contiguous()
    zero = None
    if kernel.config.zero_points:
        words = _laid(getattr(layer, kernel.w_zp_name), 1)  # [K / group, N / 8 or 4] int32
        zero = ((words[:, :, None] >> shifts) & (2**bits - 1)).reshape(words.shape[0], -1).t()
    return q[:, :k], scale, zero


def _laid(parameter, packed: int | None = None):
    """A loader's parameter as [input, output]. packed: which of the two is packed. Raises ValueError if it is not."""
    dims = [getattr(parameter, f"{name}_dim", None) for name in ("input", "output")]
    out = dims[1] if dims[1] is not None else 1 - dims[0]
    held = getattr(parameter, "packed_dim", None)
    if packed is not None and held != (packed if out == 1 else 1 - packed):
        raise ValueError(f"integers are packed along dimension {held} of {tuple(parameter.shape)}")
    return parameter.data if out == 1 else parameter.data.t()


def _check(name: str, kernel, n: int, k: int) -> None:
    """Raise UnsupportedFeature for a layer that the bundled kernels do not cover."""
    config = kernel.config
    group = k if config.group_size == -1 else config.group_size
    from bi_patch.kernels.packing import covers

    if not covers(n, k, config.weight_type.size_bits, group) or config.act_type.itemsize != 2:
        raise UnsupportedFeature(
            f"linear.cuda_packed: a {name} of {n} x {k} with {config.weight_type}, groups of {group} and activations "
            f"in {config.act_type} has no kernel: N must be a multiple of 16, K of 128, groups 32, 64 or a multiple of "
            "128. Use another checkpoint or number of GPUs, or set BI_PATCH=0"
        )


def _applied(original):
    """apply_weights: call the certified route. torch.compile sees one op."""
    import torch

    from bi_patch.ops.cuda import packed_linear

    packed_linear.define_op()
    product = torch.ops.bi_patch.packed_linear

    def apply_weights(self, layer, x, bias=None):
        data, scale, zero = self._get_weight_params(layer)
        if not self.config.zero_points:
            zero = None
        return product(x, data, scale, zero, bias, self.config.weight_type.size_bits, self.bi_patch_group, None)

    return apply_weights


def _awq(original):
    """AutoAWQConfig.get_quant_method: where upstream's mode takes slow kernels, take the layers of its fast kernels,
    whose products bi_patch replaces."""

    @functools.wraps(original)
    def get_quant_method(self, layer, prefix):
        from vllm.model_executor.layers.quantization import auto_awq

        method = original(self, layer, prefix)
        if type(method) is auto_awq.AutoAWQLinearMethod:
            method = auto_awq.AutoAWQMarlinLinearMethod(self)
        return method

    return get_quant_method


def _compressed(original):
    """CompressedTensorsWNA16.__init__: let vLLM choose a kernel in upstream's mode, too. bi_patch replaces its
    products."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.use_batch_invariant = False

    return __init__


def _nvfp4(original):
    """init_nvfp4_linear_kernel: take the bundled kernel. Where it does not serve, weights alone take Humming's
    batch-invariant schedules, and a row certificate compares them."""

    @functools.wraps(original)
    def init_nvfp4_linear_kernel(use_a16=False):
        from vllm.model_executor.kernels import linear

        asked = linear._get_linear_backend(quantization="nvfp4_w4a16" if use_a16 else "nvfp4_w4a4")
        if nvfp4.served() if use_a16 else nvfp4.keeps_rows(asked):
            return nvfp4.own()(linear.NvFp4LinearLayerConfig())
        kind = linear.HummingNvFp4LinearKernel
        able, reason = kind.is_supported()
        if not use_a16 or not able:
            said = reason if use_a16 else f"vLLM may round activations to NVFP4, --linear-backend {asked}"
            raise UnsupportedFeature(
                f"linear.cuda_nvfp4: bi_patch has no certified order for this checkpoint's NVFP4 layers ({said}). Use "
                "bf16 on Hopper without --linear-backend, or NVFP4 weights alone with the package humming-kernels, or "
                "set BI_PATCH=0"
            )
        return kind(linear.NvFp4LinearLayerConfig())

    return init_nvfp4_linear_kernel


def _ordered(original):
    """_resolve_backend_kernels: of packed integers, Humming's kernel comes after those whose products bi_patch
    replaces. vLLM puts it before Marlin on Hopper, where the package humming-kernels is installed."""

    @functools.wraps(original)
    def _resolve_backend_kernels(kernels, layer_desc, **given):
        return sorted(original(kernels, layer_desc, **given), key=lambda kernel: kernel.__name__ == _LAST)

    return _resolve_backend_kernels


_KERNELS = ("MacheteLinearKernel", "MarlinLinearKernel")
_LAST = "HummingLinearKernel"


def problems(model):
    """For every linear layer with packed weights, a Problem, and one of the dequantized weights if there is one."""
    from bi_patch.ops.cuda.packed_linear import Problem

    for name, layer, kernel in quantized.layers(model, (*_KERNELS, quantized.PACKED_NVFP4)):
        if type(kernel).__name__ == quantized.PACKED_NVFP4:
            for added in _biases(layer):
                problem = nvfp4.problem(kernel, added)
                yield from (held for held in (problem.dequantized(), problem) if held is not None)
            continue
        if not hasattr(kernel, "bi_patch_group"):
            raise UnsupportedFeature(
                f"linear.cuda_packed: {name} was loaded before bi_patch was armed. Import bi_patch first"
            )
        data, scale, zero = kernel._get_weight_params(layer)
        bits = kernel.config.weight_type.size_bits
        n, k = scale.shape[1], data.numel() * 8 // bits // scale.shape[1]
        for added in _biases(layer):
            problem = Problem(n, k, scale.dtype, added, bits, kernel.bi_patch_group, bool(kernel.config.zero_points))
            yield problem.dequantized()
            yield problem


def _biases(layer) -> tuple[bool, ...]:
    """Whether a layer's products add a bias: in a sum over ranks, only the first rank's do."""
    bias = getattr(layer, "bias", None) is not None and not getattr(layer, "skip_bias_add", False)
    return (True, False) if bias and getattr(layer, "tp_size", 1) > 1 else (bias,)


_MIXED = "vllm.model_executor.kernels.linear.mixed_precision"
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_WHY = "Marlin and Machete cut K into parts by the number of rows"
_HOW = (
    "the integers are packed for a bundled kernel, which dequantizes in registers and keeps one order. For many rows, "
    "the weights are dequantized and a 16-bit linear's certified route serves: the bits are the same"
)
_UNTIL = "vLLM's kernels have one order for every number of rows"


def _kernel(name: str, module: str, cls: str) -> tuple[Seam, Seam]:
    def seam(what, method, close, **attributed):
        return Seam(
            name=f"packed_linear.cuda_{what}",
            targets=(Target(f"{_MIXED}.{module}", f"{cls}.{method}", ">=0.33"),),
            close=close,
            why=_WHY,
            how=_HOW,
            until=_UNTIL,
            **attributed,
        )

    return (
        seam(name, "apply_weights", _applied, causes=(1, 23), op="bi_patch.ops.cuda.packed_linear"),
        seam(f"{name}_weights", "process_weights_after_loading", _loaded),
    )


SEAMS = (
    *_kernel("machete", "machete", "MacheteLinearKernel"),
    *_kernel("marlin", "marlin", "MarlinLinearKernel"),
    Seam(
        name="packed_linear.cuda_awq",
        targets=(Target(f"{_QUANTIZATION}.auto_awq", "AutoAWQConfig.get_quant_method", ">=0.33"),),
        close=_awq,
        why="upstream's mode dequantizes AWQ's weights at every call, for one row, too",
        how="AWQ's layers are those of vLLM's fast kernels, whose products bi_patch replaces",
        until=_UNTIL,
    ),
    Seam(
        name="packed_linear.cuda_compressed",
        targets=(
            Target(
                f"{_QUANTIZATION}.compressed_tensors.schemes.compressed_tensors_wNa16",
                "CompressedTensorsWNA16.__init__",
                ">=0.33",
            ),
        ),
        close=_compressed,
        why="upstream's mode unpacks the weights of compressed-tensors at every call, for one row, too",
        how="the layers are those of vLLM's fast kernels, whose products bi_patch replaces",
        until=_UNTIL,
    ),
    Seam(
        name="packed_linear.cuda_order",
        targets=(Target("vllm.model_executor.kernels.linear", "_resolve_backend_kernels", ">=0.33"),),
        close=_ordered,
        why="on Hopper vLLM takes Humming's kernel before Marlin, and its schedule depends on the number of rows",
        how="Humming's kernel comes last, so layers are those of Machete and Marlin, whose products bi_patch replaces",
        until=_UNTIL,
    ),
    Seam(
        name="packed_linear.cuda_nvfp4",
        targets=(
            Target(
                "vllm.model_executor.kernels.linear",
                "init_nvfp4_linear_kernel",
                ">=0.33",
                (
                    f"{_QUANTIZATION}.compressed_tensors.schemes.compressed_tensors_w4a4_nvfp4",
                    f"{_QUANTIZATION}.modelopt",
                    f"{_QUANTIZATION}.online.lm_head",
                    f"{_QUANTIZATION}.quark.schemes.quark_nvfp4",
                ),
            ),
        ),
        close=_nvfp4,
        why="Marlin cuts K into parts by the number of rows, and upstream's mode has no kernel for NVFP4 weights with "
        "16-bit activations on Hopper",
        how="layers with NVFP4 weights take a bundled kernel, in bf16 on Hopper. There activations stay in bf16 if a "
        "checkpoint asks for NVFP4, as in stock vLLM. Elsewhere, weights alone take Humming's batch-invariant "
        "schedules, and a row certificate compares them. Others are refused by name",
        until="upstream's mode serves NVFP4 weights on Hopper",
        causes=(1,),
        relies=(
            "vllm.model_executor.kernels.linear.nvfp4.base:NvFp4LinearKernel",
            "vllm.model_executor.kernels.linear:_get_linear_backend",
        ),
    ),
)
