"""Gives Triton's interpreter one order for `tl.dot`: ascending K, one fp32 accumulator, for every tile.

The interpreter multiplies with numpy, whose BLAS chooses the order of a sum by the shapes. The interpreter also holds
bf16 as integers and would multiply these. `install` replaces both. So a test in the interpreter shows what a kernel
does with its tiles. It shows nothing about the order inside a device's matrix unit. Set TRITON_INTERPRET=1 before the
import of this module.
"""

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter


def _floats(handle) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _create_dot(self, a, b, total, input_precision, max_num_imprecise_acc):
    x, y = _floats(a), _floats(b)
    out = total.data.astype(np.float32, copy=True)
    for k in range(x.shape[-1]):
        out += x[:, k : k + 1] * y[k : k + 1, :]
    return interpreter.TensorHandle(out, total.dtype.scalar)


def _reduce(self, input):
    """tl.max by numpy. The interpreter does not know triton-ascend's combination for it, and takes minutes."""
    if "_elementwise_max" in getattr(self.combine_fn, "__name__", ""):
        return self.min_max(input[0], val_reduce_op=np.max)
    return _apply(self, input)


_apply = interpreter.ReduceOps.apply_impl


def install() -> None:
    """Replace the interpreter's dot and its slow maximum in this process."""
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter.ReduceOps.apply_impl = _reduce
