"""Quantized linear layers: INT8 weights and activations, 4-bit weights, FP8 in blocks. Each takes a certified route."""

import functools
import weakref

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import active, library, scales
from bi_patch.seams.model import Seam, Target


def _int8(original):
    """CPUInt8ScaledMMLinearKernel.process_weights_after_loading: pack the weight, then give the layer a route."""

    @functools.wraps(original)
    def process_weights_after_loading(self, layer):
        import torch

        from bi_patch.ops.cpu import quantized

        dtype = torch.get_default_dtype()
        _first(layer)
        weight, scale = layer.weight.data, layer.weight_scale.data
        n, k = weight.shape
        widths = layer.logical_widths
        if dtype == torch.bfloat16:
            original(self, layer)
        else:  # upstream's AMX kernel ends the process in fp16, and has no fp32
            self.linear_method = self._apply_weights_onednn
            self.process_weights_for_onednn(layer)
        kernel = self.linear_method.__name__.removeprefix("_apply_weights_")
        # oneDNN reads the scales at their place. An update copies them to the layer's first tensor, and frees these.
        self.bi_patch_scale = layer.weight_scale
        kind = "static" if self.config.is_static_input_scheme else "token"

        def wide():
            held = scale.float().reshape(-1)
            if held.numel() == n:
                return held
            counts = torch.tensor(widths if held.numel() == len(widths) else [n])
            return held.repeat_interleave(counts)

        _route(
            self,
            layer,
            f"W8A8 {kernel} {kind}",
            lambda: (weight.float() * wide()[:, None]).to(dtype),
            lambda: quantized.integer_product(weight, wide()) if kind == "token" else _no_static(layer),
            (n, k),
            dtype,
        )

    return process_weights_after_loading


def _int4(original):
    """CPUWNA16LinearKernel.process_weights_after_loading: pack the weight, then give the layer a route."""

    @functools.wraps(original)
    def process_weights_after_loading(self, layer):
        from bi_patch.ops.cpu import quantized

        _first(layer)
        _read[layer] = {self.w_q_name, self.w_s_name, "bias"} | ({self.w_zp_name} if self.config.zero_points else set())
        k, n = self.config.partition_weight_shape
        names = (self.w_q_name, self.w_s_name, self.w_zp_name if self.config.zero_points else None)
        # Upstream replaces the tensors' data; these are the checkpoint's.
        held = [None if name is None else _Held(getattr(layer, name)) for name in names]
        dtype = self.config.act_type
        original(self, layer)
        groups = getattr(layer, self.w_s_name).numel() // n
        scheme = (
            f"W4A{8 if layer.use_w4a8 else 16} groups of {k // groups}{' zeros' if self.config.zero_points else ''}"
        )

        def weight():
            return _dequantized(self.config.weight_type, *held).to(dtype)

        _route(self, layer, scheme, weight, lambda: quantized.dequantized_product(weight()), (n, k), dtype)

    return process_weights_after_loading


def _fp8(original):
    """CPUFp8BlockScaledMMKernel.process_weights_after_loading: pack the weight, then give the layer a route."""

    @functools.wraps(original)
    def process_weights_after_loading(self, layer):
        from bi_patch.ops.cpu import quantized

        _first(layer)
        params = self._get_layer_params(layer)
        weight = params.weight.data
        scale = (params.weight_scale if params.weight_scale_inv is None else params.weight_scale_inv).data
        original(self, layer)
        if getattr(layer, "_cpu_skip_gemm_dispatch", False):  # multi-head latent attention, which is refused
            return
        rows, columns = self.weight_group_shape
        dtype = self.config.out_dtype

        def wide():
            n, k = weight.shape
            factors = scale.float().repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
            return (weight.float() * factors).to(dtype)

        scheme = f"FP8 blocks of {rows}x{columns}"
        _route(self, layer, scheme, wide, lambda: quantized.dequantized_product(wide()), tuple(weight.shape), dtype)

    return process_weights_after_loading


def _no_static(layer):
    """The bundled GEMM scales each row of activations itself, and so would compute another function."""
    raise UnsupportedFeature(
        f"quantized.cpu_static: the certificate of a {type(layer).__name__} with static INT8 activations failed, and "
        "no bundled kernel takes their scale. Use a checkpoint with dynamic activations, or set BI_PATCH=0"
    )


_UPDATED = ("W4A8 ", "W4A16 ", "W8A8 onednn token")  # schemes of layers that take new weights


def _first(layer):
    """Raise UnsupportedFeature if a layer that has a route gets new weights, and no evidence covers that, or a scale
    among them gives no numbers. `quantized.scales` looks at the scales of the first weights."""
    from bi_patch.ops.cpu import quantized

    if not quantized.has_route(layer):
        return
    scales.check_layer(layer, getattr(layer, "prefix", ""))
    if not quantized.scheme(layer).startswith(_UPDATED):
        raise UnsupportedFeature(
            f"quantized.cpu_update: no evidence covers new weights in a quantized {type(layer).__name__} "
            f"({quantized.scheme(layer)}). Start a new engine with the new weights"
        )


# Layer of 4 bits -> the names of the tensors that its kernel reads. A checkpoint may have others, e.g. GPTQ's qzeros.
_read: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def complete(layer, info) -> bool:
    """Whether a load that left tensors of a layer out brought all that its kernel reads. info: LayerReloadingInfo."""
    from vllm.model_executor.model_loader.reload.utils import get_layer_tensors, get_tensor_load_numel

    read = _read.get(layer)
    if not read:
        return False
    # load_numel counts elements of all tensors: those that came must be whole, too.
    wanted = read | {name for name, _ in info.loaded_weights}
    return info.load_numel >= sum(
        get_tensor_load_numel(held) for name, held in get_layer_tensors(layer).items() if name in wanted
    )


class _Held:
    """A loaded parameter: its data, and the dimensions of input, output and packing as vLLM declares them."""

    def __init__(self, parameter):
        self.data = parameter.data
        self.packed = getattr(parameter, "packed_dim", None)
        self.output = parameter.output_dim


def _dequantized(kind, weight, scale, zeros):
    """The weight [N, K] in fp32 of 4-bit integers as loaded: (q - zero) * scale for each group of K."""
    import torch
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32 as unpack

    def outputs_first(held, values):
        return values if held.output == 0 else values.t()

    q = outputs_first(weight, unpack(weight.data, kind, weight.packed)).float()
    s = outputs_first(scale, scale.data).float()
    size = q.shape[1] // s.shape[1]
    zero = torch.full_like(s, float(kind.bias))
    if zeros is not None:
        zero = outputs_first(zeros, unpack(zeros.data, kind, zeros.packed)).float()
    return (q - zero.repeat_interleave(size, 1)) * s.repeat_interleave(size, 1)


def _route(kernel, layer, scheme, weight, substitute, sizes, dtype):
    """Let a kernel object of vLLM serve by a certified route."""
    from bi_patch.ops.cpu import quantized

    own, served = type(kernel).apply_weights, weakref.ref(layer)

    def vendor(x, bias):
        return own(kernel, served(), x, bias)

    route = quantized.route(
        layer,
        scheme,
        vendor,
        weight,
        substitute,
        sizes=sizes,
        dtype=dtype,
        bias=getattr(layer, "bias", None),
        cache=active.cache,
        library=library.vllm(),
    )
    kernel.apply_weights = lambda layer, x, bias=None: route(x, bias)


# Methods that compute no product of weights.
_HARMLESS = ("Attention", "MLAAttention")


def check(model):
    """Raise UnsupportedFeature for the first layer of a loaded model that is quantized and has no route."""
    from bi_patch.ops.cpu import quantized

    for name, layer in model.named_modules():
        method = type(getattr(layer, "quant_method", None)).__name__
        plain = method == "NoneType" or method.startswith("Unquantized") or type(layer).__name__ in _HARMLESS
        if not plain and not quantized.has_route(layer):
            raise UnsupportedFeature(
                f"engine.cpu_load: no kernel for {name or 'the model'} ({type(layer).__name__}, {method}) is "
                "certified. Use a checkpoint that leaves this layer unquantized, or set BI_PATCH=0 to run vLLM without "
                "bi_patch"
            )


def _seam(name: str, module: str, kernel: str, close, how: str) -> Seam:
    return Seam(
        name=f"quantized.{name}",
        targets=(Target(f"vllm.model_executor.kernels.linear.{module}", f"{kernel}.process_weights_after_loading"),),
        close=close,
        why="the number of rows may decide the kernel, its tiles and where it cuts K",
        how=how,
        until="upstream states the order of its quantized CPU kernels",
        causes=(1,),
        op="bi_patch.ops.cpu.quantized",
    )


SEAMS = (
    _seam(
        "cpu_int8",
        "scaled_mm.cpu",
        "CPUInt8ScaledMMLinearKernel",
        _int8,
        "vLLM's INT8 kernel serves the numbers of rows that are certified, and rows between are filled up. In fp16 and "
        "fp32, oneDNN's kernel replaces one that ends the process",
    ),
    _seam(
        "cpu_int4",
        "mixed_precision.cpu",
        "CPUWNA16LinearKernel",
        _int4,
        "vLLM's 4-bit kernel serves the numbers of rows that are certified, and rows between are filled up",
    ),
    _seam(
        "cpu_fp8",
        "scaled_mm.cpu",
        "CPUFp8BlockScaledMMKernel",
        _fp8,
        "vLLM's kernel for FP8 in blocks serves the numbers of rows that are certified, and others are filled up, "
        "because up to four rows would take another kernel",
    ),
)
