"""Gated activations on Ascend by the bundled kernel."""

from __future__ import annotations

from bi_patch.ops.ascend import machine
from bi_patch.ops.ascend.forms import along


def npu_swiglu(input, dim=-1):
    """silu(first half) * second half, for input [..., 2 H, ...] (floats) split in two along dim -> [..., H, ...]."""
    from bi_patch.kernels.ascend import pointwise

    return along(input, dim, lambda x: pointwise.swiglu(x, machine.chip()))
