"""Sums, means, softmax, running sums and sorting on Ascend, each in one order."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bi_patch.ops.ascend import machine
from bi_patch.ops.ascend.forms import along, refuse


def _last(x, dims: Sequence[int]):
    """x with `dims` moved to the end and merged into one dimension, and the list of the other dimensions."""
    kept = [d for d in range(x.dim()) if d not in dims]
    moved = x.permute(*kept, *dims).contiguous()
    return moved.view(*(x.shape[d] for d in kept), -1), kept


def _reduce(x, dim, keepdim: bool, dtype, mean: bool):
    from bi_patch.kernels.ascend import rows

    dims = range(x.dim()) if dim is None or (isinstance(dim, (list, tuple)) and not dim) else dim
    dims = sorted({d % max(1, x.dim()) for d in ([dims] if isinstance(dims, int) else dims)})
    if dtype is not None and dtype.is_floating_point and dtype.itemsize < x.dtype.itemsize:
        refuse("aten::sum", f"a sum of {x.dtype} into {dtype}")
    if not x.dtype.is_floating_point or x.dtype.itemsize > 4:
        refuse("aten::sum", f"a sum of {x.dtype} into {dtype}")
    if x.dim() == 0:
        return x.to(dtype or x.dtype)
    count = math.prod(x.shape[d] for d in dims)
    flat, _ = _last(x, dims)
    if count == 0:
        out = flat.new_full(flat.shape[:-1], float("nan") if mean else 0.0, dtype=dtype or x.dtype)
    elif "npu_reduce_sum_batch_invariant" in machine.ascendc() and not mean and dtype in (None, x.dtype):
        out = machine.ascendc()["npu_reduce_sum_batch_invariant"](flat, -1, False)
    else:
        out = rows.total(flat, machine.chip(), dtype, mean)
    if keepdim:
        out = out.view(*(1 if d in dims else x.shape[d] for d in range(x.dim())))
    return out


def sum_all(self, *, dtype=None):
    """The sum of all of self (floats) -> a scalar tensor of dtype, by default self's."""
    return _reduce(self, None, False, dtype, False)


def sum_dim(self, dim, keepdim=False, *, dtype=None):
    """The sum of self [...] (floats) over the dimensions `dim`, all if empty; of dtype, by default self's."""
    return _reduce(self, dim, keepdim, dtype, False)


def mean_all(self, *, dtype=None):
    """The mean of all of self (floats) -> a scalar tensor of dtype, by default self's."""
    return _reduce(self, None, False, dtype, True)


def mean_dim(self, dim, keepdim=False, *, dtype=None):
    """The mean of self [...] (floats) over the dimensions `dim`, all if empty; of dtype, by default self's."""
    return _reduce(self, dim, keepdim, dtype, True)


def _soft(self, dim, dtype, log):
    from bi_patch.kernels.ascend import rows

    if not self.dtype.is_floating_point or self.dtype.itemsize > 4:
        refuse("aten::_softmax", f"softmax of {self.dtype}")
    return along(self, dim, lambda x: rows.softmax(x, machine.chip(), dtype, log))


def softmax_half(self, dim, half_to_float):
    """softmax of self [...] (floats) along dim -> the same shape; fp32 if half_to_float."""
    import torch

    return _soft(self, dim, torch.float32 if half_to_float else None, False)


def log_softmax_half(self, dim, half_to_float):
    """log_softmax of self [...] (floats) along dim -> the same shape; fp32 if half_to_float."""
    import torch

    return _soft(self, dim, torch.float32 if half_to_float else None, True)


def softmax_int(self, dim, dtype=None):
    """softmax of self [...] (floats) along dim -> the same shape, of dtype, by default self's."""
    return _soft(self, dim, dtype, False)


def log_softmax_int(self, dim, dtype=None):
    """log_softmax of self [...] (floats) along dim -> the same shape, of dtype, by default self's."""
    return _soft(self, dim, dtype, True)


def cumsum(self, dim, *, dtype=None):
    """The running sum of self [...] (floats) along dim -> the same shape, of dtype, by default self's."""
    from bi_patch.kernels.ascend import rows

    if not self.dtype.is_floating_point or self.dtype.itemsize > 4:
        refuse("aten::cumsum", f"a running sum of {self.dtype} into {dtype}")
    return along(self, dim, lambda x: rows.cumsum(x, machine.chip(), dtype))


def topk(self, k, dim=-1, largest=True, sorted=True):
    """The k largest (or smallest) values of self [...] along dim, sorted, and their int64 indices.

    A stable sort selects the values, so the lower index wins a tie.
    """
    import torch

    values, indices = torch.ops.aten.sort.stable(self, stable=True, dim=dim, descending=largest)
    return values.narrow(dim, 0, k).contiguous(), indices.narrow(dim, 0, k).contiguous()


def sort(self, dim=-1, descending=False):
    """self [...] (any dtype) sorted along dim, and int64 indices, both of self's shape; the sort is stable."""
    import torch

    return torch.ops.aten.sort.stable(self, stable=True, dim=dim, descending=descending)
