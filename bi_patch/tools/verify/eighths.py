"""Compares FP8 linears on CUDA with fp64: their products with the weight that vLLM loaded, and this weight with the
checkpoint's.

vLLM may change an FP8 weight as it loads it. Where DeepGEMM serves blocks, vLLM rounds each block once more, to a scale
that is a power of two. The parts of a merged layer with one scale for a weight are rounded once more to the largest of
their scales. A weight of 16 bits may become FP8 only while it is loaded. So a product is compared with fp64 on the
loaded weight: its own 8-bit floats times its own scales. Apart from that, each loaded weight must lie within half a
step of e4m3 of the checkpoint's, and where vLLM rounds nothing, both must be equal.

A scale of blocks lies as [ceil(N / 128), ceil(K / 128)] fp32 on Hopper, with DeepGEMM, too. A weight with scales of
rows or one scale lies as [K, N], and both may be filled up to multiples of 16.

Rows are 8-bit floats already, so that their quantization changes no element, except where the checkpoint has one scale
for activations: there the rows are rounded as the kernel rounds them, and elements near the middle between two floats
are zero.

Hopper's tensor cores cut each term of a sum to 13 bits below the greatest, for 32 products at a time. An emulation of
such sums, for random rows and K up to 12,288, stays below half of LIMIT of the sum of the products' magnitudes. Kernels
for blocks take a sum out after each group, so their limit is smaller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from bi_patch.tools.verify.dequantized import Checkpoint

LIMIT, LIMIT_OF_BLOCKS = 2.0**-10, 2.0**-11
NEAR = 1e-4
BLOCK = 128
COLUMNS = 4096  # outputs that are compared at most, for wide layers
_AT_ONCE = 1024  # rows of a weight in fp64, a multiple of BLOCK
_MOST = 448.0  # the largest float of e4m3
_BITS, _LEAST = 3, -6  # of e4m3: bits of the mantissa, and the exponent of the least normal float
_FLOOR = 1e-4  # vLLM takes no smaller value for the largest one of a block
_FLOOR_OF_MADE = 2.0**-9  # the same for the largest one of a weight that becomes FP8 as it is loaded
_FP16 = 2.0**-11, 2.0**-25  # vLLM rounds parts to fp16 before it rounds them again: relative and absolute error

_BLOCKS = ("DeepGemmFp8BlockScaledMMKernel", "CutlassFp8BlockScaledMMKernel", "TritonFp8BlockScaledMMKernel")
_ROWS = "CutlassFP8ScaledMMLinearKernel"
BY_BLOCK, BY_ROW, STATIC = "W8A8 FP8 blocks", "W8A8 FP8 by row", "W8A8 FP8 static"
SCHEMES = (BY_BLOCK, BY_ROW, STATIC)


class Loaded(NamedTuple):
    """A loaded weight [N, K] e4m3, and its scales: fp32 [ceil(N / 128), ceil(K / 128)], or [N]."""

    floats: torch.Tensor
    scale: torch.Tensor

    @property
    def blocks(self) -> bool:
        return self.scale.ndim == 2

    def scales(self) -> torch.Tensor:
        """The scale of each element, fp64 [N, K]."""
        n, k = self.floats.shape
        scale = self.scale.double()
        return spread(scale, n, k) if self.blocks else scale[:, None].expand(n, k)

    def part(self, begin: int, end: int) -> Loaded:
        """Some of the rows. begin, and end unless it is past the last row: multiples of BLOCK."""
        size = BLOCK if self.blocks else 1
        return Loaded(self.floats[begin:end], self.scale[begin // size : -(-end // size)])

    def dequantized(self) -> torch.Tensor:
        """The weight in fp64: exact."""
        return self.floats.double() * self.scales()


def kernel(module: torch.nn.Module):
    """vLLM's kernel of an FP8 linear with a certified product, else None."""
    method = getattr(module, "quant_method", None)
    inner = getattr(getattr(method, "scheme", None), "linear_method", None)  # AutoRound's
    for owner in (method, getattr(module, "scheme", None), inner):
        for name in ("fp8_linear", "kernel"):
            found = getattr(owner, name, None)
            if type(found).__name__ in (*_BLOCKS, _ROWS):
                return found
    return None


def scheme(module: torch.nn.Module) -> str:
    """The scheme of a linear with such a kernel, one of SCHEMES; "" for others, and for weights of grouped products."""
    held = kernel(module)
    if held is None or getattr(module, "is_bmm", False):
        return ""
    if type(held).__name__ in _BLOCKS:
        return BY_BLOCK
    return STATIC if held.quant_fp8.static else BY_ROW


def loaded(module: torch.nn.Module, n: int, k: int) -> Loaded:
    """The weight [n, k] of a layer with a scheme. Raises ValueError if it lies in no known way."""
    held = kernel(module)
    weight = module.weight.detach()
    if type(held).__name__ in _BLOCKS:
        scale = getattr(module, "weight_scale_inv", None)
        scale = (module.weight_scale if scale is None else scale).detach()
        if weight.shape != (n, k) or scale.shape != (-(-n // BLOCK), -(-k // BLOCK)):
            raise ValueError(f"a weight {tuple(weight.shape)} with scales {tuple(scale.shape)}")
    else:
        scale = getattr(module, held.layer_param_names[1]).detach().reshape(-1)
        weight = getattr(module, held.layer_param_names[0]).detach().t()
        if weight.shape[0] < n or weight.shape[1] < k or scale.numel() not in (1, weight.shape[0]):
            raise ValueError(f"a weight {tuple(weight.shape)} with {scale.numel()} scales")
        weight, scale = weight[:n, :k], scale.expand(n) if scale.numel() == 1 else scale[:n]
    if str(weight.dtype) != "torch.float8_e4m3fn" or str(scale.dtype) != "torch.float32":
        raise ValueError(f"a weight of {weight.dtype} with scales of {scale.dtype}")
    return Loaded(weight, scale)


def spread(scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The scales of blocks as those of elements [n, k]."""
    return scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]


def near(held: Loaded, checkpoint: torch.Tensor, merged_scale: float | None = None, made: bool = False) -> float:
    """The greatest distance of a loaded weight from the checkpoint's, [N, K] fp64, divided by what vLLM's rounding may
    change. 0: equal; above 1: wrong.

    merged_scale: the largest scale of the parts of a merged layer, each with one scale for its weight; None: the
    scales are of rows or blocks. Blocks may be rounded to a power of two that is less than twice the least scale that
    holds them. Scales of rows are as in the checkpoint. made: the checkpoint's weight has 16 bits; then every scale may
    be new, up to twice the least that holds its block, row or weight.
    """
    one = made and not held.blocks and bool((held.scale == held.scale[0]).all())
    most = float(checkpoint.abs().amax()) if one else None
    device = held.floats.device
    return max(
        _near(held.part(at, at + _AT_ONCE), checkpoint[at : at + _AT_ONCE].to(device), merged_scale, made, most)
        for at in range(0, checkpoint.shape[0], _AT_ONCE)
    )


def _near(held: Loaded, want: torch.Tensor, merged_scale: float | None, made: bool, most: float | None) -> float:
    """`near` for some rows. most: of a weight with one new scale, its largest absolute value."""
    import torch

    off = (held.dequantized() - want).abs()
    if not bool(off.any()):
        return 0.0
    scale, slack, rounded = held.scales(), 0.0, torch.zeros_like(want, dtype=torch.bool)
    if held.blocks:
        powers = spread(torch.frexp(held.scale).mantissa == 0.5, *want.shape)
    if made:
        extent = _extent(held, want) if most is None else torch.full_like(want, most)
        rounded = scale <= 2 * extent.clamp_min(_FLOOR_OF_MADE) / _MOST
        if held.blocks:  # a block is rounded to its least scale, and then to a power of two
            slack = torch.where(powers, _half(want.abs(), extent.clamp_min(_FLOOR) / _MOST), 0.0)
    elif held.blocks:
        rounded = powers & (scale < 2 * _extent(held, want).clamp_min(_FLOOR) / _MOST)
    elif merged_scale is not None:
        rounded, slack = scale == merged_scale, want.abs() * _FP16[0] + _FP16[1]
    allowed = torch.where(rounded, (_half(want.abs() + slack, scale) + slack) * (1 + 2.0**-16), 0.0)
    excess = torch.where(off == 0, 0.0, off / allowed)
    return float(torch.nan_to_num(excess, nan=torch.inf, posinf=torch.inf).max())


def _half(value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Half a step of e4m3 at a value, in the value's unit."""
    import torch

    exponent = (torch.frexp(value / scale).exponent - 1).clamp_min(_LEAST)
    return torch.ldexp(scale, exponent - _BITS - 1)


def _extent(held: Loaded, want: torch.Tensor) -> torch.Tensor:
    """For each element, the largest absolute value of its block or row."""
    if held.blocks:
        return spread(_largest(want), *want.shape)
    return want.abs().amax(1, keepdim=True).expand(want.shape)


def _largest(w: torch.Tensor) -> torch.Tensor:
    """The largest absolute value of each block of [N, K]."""
    import torch

    n, k = w.shape
    padded = torch.nn.functional.pad(w.abs(), (0, -k % BLOCK, 0, -n % BLOCK))
    return padded.view(-(-n // BLOCK), BLOCK, -(-k // BLOCK), BLOCK).amax((1, 3))


def rows(m: int, k: int, dtype: torch.dtype, static: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows [m, k] of dtype, and what the kernel multiplies with in fp64. static: the scale of activations.

    Without it, rows are 8-bit floats times 2**-6, and every 128 elements begin with the largest float. So a scale of a
    row, of 128 elements, or of a power of two changes no element.
    """
    import torch

    kind = torch.float8_e4m3fn
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    if static is not None:
        x = x.to(dtype)
        scaled = (x.double() / static).clamp(-_MOST, _MOST)
        below, above = ((scaled * (1 + by)).clamp(-_MOST, _MOST).float().to(kind).float() for by in (-NEAR, NEAR))
        x = torch.where(below == above, x, 0)
        return x, torch.where(below == above, below, 0).double() * static
    x = x.mul_(64).round_()
    x[:, ::BLOCK] = _MOST
    x = (x.clamp(-_MOST, _MOST).to(kind).float() / 64).to(dtype)
    return x, x.double()


def error(layer: torch.nn.Module, w: torch.Tensor, dtype: torch.dtype, m: int, static: float | None) -> float:
    """The largest error of a layer's product of m rows, divided by the allowed error. w: the loaded weight in fp64, or
    its first rows. static: as for `rows`."""
    import torch

    from bi_patch.tools.verify.precision import over

    x, wide = (held.to(w.device) for held in rows(m, w.shape[1], dtype, static))
    bias = getattr(layer, "bias", None)
    bias = None if bias is None or getattr(layer, "skip_bias_add", False) else bias
    y = layer.quant_method.apply(layer, x, bias)[:, : w.shape[0]]
    limit = LIMIT_OF_BLOCKS if scheme(layer) == BY_BLOCK else LIMIT
    exact, allowed = wide @ w.T, limit * (wide.abs() @ w.abs().T)
    if bias is not None:
        # vLLM may add the bias to the rounded product.
        allowed = allowed + exact.abs() * torch.finfo(dtype).eps / 2
        exact = exact + bias[: w.shape[0]].double()
    return over(y, exact, allowed)


def compare(layer, name: str, how: str, checkpoint: Checkpoint, dtype, counts) -> tuple[float, int, tuple[int, int]]:
    """The largest excess of a layer, the rows at which it is, and the weight's sizes. rows 0: the weight itself.

    how: the layer's scheme. counts: the numbers of rows. Raises KeyError and OSError if the checkpoint has no tensors
    of this name, and ValueError as `loaded`.
    """
    made = not checkpoint.has_scales(name)
    want = checkpoint.plain(name) if made else checkpoint.weight(name, None)
    held = loaded(layer, *want.shape)
    merged = None if made else checkpoint.one_scale(name)
    static = checkpoint.static_scale(name) if how == STATIC else None
    found = [(near(held, want, merged, made), 0)]
    exact = held.part(0, min(COLUMNS, want.shape[0])).dequantized()
    found += ((error(layer, exact, dtype, m, static), m) for m in counts)
    return *max(found, key=lambda pair: pair[0]), want.shape
