"""Matrix products on Ascend in one order. AscendC serves where it is installed; else the bundled kernel serves."""

from __future__ import annotations

import math

from bi_patch.ops.ascend import machine
from bi_patch.ops.ascend.forms import refuse


def _product(x, w, bias=None, alpha=1.0, beta=1.0):
    """alpha * (x [B, M, K] @ w [B, K, N]) + beta * bias -> [B, M, N], by AscendC or by the bundled kernel."""
    from bi_patch.kernels.ascend import matmul

    if x.dtype != w.dtype:
        raise RuntimeError(f"both operands must have one dtype, found {x.dtype} and {w.dtype}")
    vendor = machine.ascendc()
    if not vendor or not x.dtype.is_floating_point:
        if not x.dtype.is_floating_point:
            refuse("aten::matmul", f"{x.dtype} operands")
        return matmul.matmul(x, w, machine.chip(), bias, alpha, beta)
    if x.shape[0] == 1:
        out = vendor["npu_mm_batch_invariant"](x[0], w[0])[None]
    else:
        out = vendor["npu_matmul_batch_invariant"](x, w)
    if alpha != 1:
        out = out * alpha
    if bias is not None and beta != 0:
        out = out + (bias if beta == 1 else bias * beta)
    return out


def mm(self, mat2):
    """self [M, K] @ mat2 [K, N] -> [M, N]; floats of one dtype."""
    return _product(self[None], mat2[None])[0]


def addmm(self, mat1, mat2, *, beta=1, alpha=1):
    """beta * self + alpha * (mat1 [M, K] @ mat2 [K, N]) -> [M, N]; floats; self is broadcast to [M, N]."""
    return _product(mat1[None], mat2[None], self, alpha, beta)[0]


def bmm(self, mat2):
    """self [B, M, K] @ mat2 [B, K, N] -> [B, M, N]; floats of one dtype."""
    return _product(self, mat2)


def baddbmm(self, batch1, batch2, *, beta=1, alpha=1):
    """beta * self + alpha * (batch1 [B, M, K] @ batch2 [B, K, N]) -> [B, M, N]; floats; self is broadcast."""
    return _product(batch1, batch2, self, alpha, beta)


def mv(self, vec):
    """self [M, K] @ vec [K] -> [M]; floats of one dtype."""
    return _product(self[None], vec[None, :, None])[0, :, 0]


def dot(self, tensor):
    """self [K] @ tensor [K] -> a scalar tensor; floats of one dtype."""
    return _product(self[None, None], tensor[None, :, None])[0, 0, 0]


def linear(input, weight, bias=None):
    """input [..., K] @ weight [N, K].T (+ bias [N]) -> [..., N]; floats of one dtype."""
    rows = input.reshape(-1, input.shape[-1])
    return _product(rows[None], weight.t()[None], bias)[0].view(*input.shape[:-1], weight.shape[0])


def matmul(self, other):
    """self [..., M, K] @ other [..., K, N] -> [..., M, N]; batches are broadcast; floats of one dtype."""
    if self.dim() == 1 and other.dim() == 1:
        return dot(self, other)
    if other.dim() <= 2:
        w = other if other.dim() == 2 else other[:, None]
        x = self if self.dim() > 1 else self[None]
        out = _product(x.reshape(1, -1, x.shape[-1]), w[None])[0].view(*x.shape[:-1], w.shape[1])
        out = out if other.dim() == 2 else out[..., 0]
        return out if self.dim() > 1 else out[0]
    import torch

    x = self if self.dim() > 1 else self[None]
    batch = torch.broadcast_shapes(x.shape[:-2], other.shape[:-2])
    x_all, w_all = x.expand(*batch, *x.shape[-2:]), other.expand(*batch, *other.shape[-2:])
    count = math.prod(batch)
    out = _product(
        x_all.reshape(count, *x.shape[-2:]).contiguous(), w_all.reshape(count, *other.shape[-2:]).contiguous()
    )
    out = out.view(*batch, x.shape[-2], other.shape[-1])
    return out if self.dim() > 1 else out[..., 0, :]


def npu_linear(input, weight, bias=None):
    """input [..., K] @ weight [N, K].T (+ bias [N]) -> [..., N]; floats of one dtype."""
    return linear(input, weight, bias)
