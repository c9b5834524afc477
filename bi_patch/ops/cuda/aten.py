"""PyTorch's own matrix products, sums and means on CUDA, in canonical order for every caller.

On Hopper, upstream's mode leaves mm, addmm and baddbmm to the library. Upstream's mode also covers mean only over given
dimensions, and no `.out` form except bmm's. Compiled code calls the forms that upstream leaves out. Here every form has
one order. mm and an addmm that is a linear take the linear's route; other products take the bundled GEMM; sums and
means take the bundled row sum. PyTorch's own kernels serve integers, which are exact in any order, and fp64.
"""

from __future__ import annotations

import math

import torch

from bi_patch.ops import overrides

_library: list[torch.library.Library] = []
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def override(key: str = "CUDA") -> None:
    """Register the overrides below on a dispatch key, over those of PyTorch and upstream's mode. A second call does
    nothing."""
    if not _library:
        _library.append(overrides.register(_OVERRIDES, key))


def _mm(a, b):
    """a [M, K] @ b [K, N] -> [M, N], as a linear whose weight is b.T."""
    from bi_patch.ops.cuda import linear

    return linear.linear(a, b.t(), None)


def _addmm(bias, a, b, *, beta=1, alpha=1):
    """beta * bias + alpha * (a [M, K] @ b [K, N]), rounded once. A call that is a linear with bias is served as one."""
    from bi_patch.ops.cuda import linear

    if beta == 1 and alpha == 1 and bias.dim() == 1 and bias.shape[0] == b.shape[1] and bias.dtype == a.dtype:
        return linear.linear(a, b.t(), bias.contiguous())
    return _scaled(bias, _wide(a, b), beta, alpha, a.dtype)


def _addmv(bias, a, b, *, beta=1, alpha=1):
    """beta * bias + alpha * (a [M, K] @ b [K]), rounded once."""
    return _scaled(bias, _wide(a, b[:, None])[:, 0], beta, alpha, a.dtype)


def _mm_as(a, b, dtype):
    """a [M, K] @ b [K, N], rounded once, to `dtype`."""
    return _wide(a, b).to(dtype)


def _baddbmm(bias, a, b, *, beta=1, alpha=1):
    """beta * bias + alpha * (a [B, M, K] @ b [B, K, N]), rounded once."""
    return _scaled(bias, _batched(a, b), beta, alpha, a.dtype)


def _batched(a, b):
    """a [B, M, K] @ b [B, K, N], in fp32."""
    products = [_wide(x, y) for x, y in zip(a, b, strict=True)]
    return torch.stack(products) if products else a.new_empty((0, a.shape[1], b.shape[2]), dtype=torch.float32)


def _wide(a, b):
    """a @ b in fp32, not yet rounded to the operands' dtype."""
    from bi_patch.ops.cuda import linear

    out = torch.empty((a.shape[0], b.shape[1]), dtype=torch.float32, device=a.device)
    a = a if a.stride(-1) == 1 else a.contiguous()
    return linear.bundled(a, b.t(), None, False, out)


def _scaled(bias, product, beta, alpha, dtype):
    product = product if alpha == 1 else product * alpha
    # As in PyTorch, beta = 0 ignores the contents of bias, also a NaN.
    return (product if beta == 0 else product + beta * bias.float()).to(dtype)


def _sum(x, dim=None, keepdim=False, *, dtype=None):
    return _reduce(x, dim, keepdim, dtype, mean=False)


def _mean(x, dim=None, keepdim=False, *, dtype=None):
    return _reduce(x, dim, keepdim, dtype, mean=True)


def _reduce(x, dim, keepdim, dtype, mean):
    from bi_patch.kernels.triton import reduce

    dims = range(x.dim()) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    gone = sorted({d % max(x.dim(), 1) for d in dims})
    kept = [d for d in range(x.dim()) if d not in gone]
    shape = [x.shape[d] for d in kept]
    rows = x.permute(*kept, *gone).reshape(math.prod(shape), -1 if x.numel() else math.prod(x.shape[d] for d in gone))
    out = reduce.row_sum(rows.contiguous(), dtype or x.dtype, mean)
    return out.view([1 if d in gone else n for d, n in enumerate(x.shape)] if keepdim else shape)


def _floats(x, *_, dtype=None, **__) -> bool:
    return x.dtype in _FLOATS and dtype in (None, x.dtype, torch.float32)


def _alike(a, b, *_, **__) -> bool:
    return a.dtype == b.dtype and a.dtype in _FLOATS


def _single(a, b, *_, **__) -> bool:
    return a.dtype == b.dtype == torch.float32


def _alike_with_bias(bias, a, b, **__) -> bool:
    return bias.dtype in _FLOATS and _alike(a, b)


# By operator: which arguments are covered, and the function that computes the result. PyTorch implements sum and mean
# without dimensions by the forms with dimensions, and matmul, linear, mv and einsum by these products. Upstream's mode
# serves bmm and softmax; this table adds their `.out` forms. It also adds bmm of fp32, which upstream multiplies in
# TF32. Hugging Face's rotary embedding multiplies positions and frequencies with bmm of fp32.
_OVERRIDES: overrides.Overrides = {
    "mm": (_alike, _mm),
    "mm.out": (_alike, _mm),
    "mm.dtype": (_alike, _mm_as),
    "mm.dtype_out": (_alike, _mm_as),
    "addmm": (_alike_with_bias, _addmm),
    "addmm.out": (_alike_with_bias, _addmm),
    "addmm_": (_alike_with_bias, _addmm),
    "addmv": (_alike_with_bias, _addmv),
    "addmv.out": (_alike_with_bias, _addmv),
    "addmv_": (_alike_with_bias, _addmv),
    "baddbmm": (_alike_with_bias, _baddbmm),
    "baddbmm.out": (_alike_with_bias, _baddbmm),
    "baddbmm_": (_alike_with_bias, _baddbmm),
    "bmm": (_single, _batched),
    "bmm.out": (_alike, torch.bmm),
    "sum.dim_IntList": (_floats, _sum),
    "sum.IntList_out": (_floats, _sum),
    "mean.dim": (_floats, _mean),
    "mean.out": (_floats, _mean),
    "_softmax.out": (_floats, torch._softmax),
    "_log_softmax.out": (_floats, torch._log_softmax),
}
