"""Gives Triton's interpreter one order for `tl.dot`: ascending K, one fp32 accumulator, for every tile.

The interpreter multiplies with numpy, whose BLAS chooses the order of a sum by the shapes. The interpreter also holds
bf16 as integers and would multiply these. `install` replaces both. So a test in the interpreter shows what a kernel
does with its tiles. It shows nothing about the order inside a device's matrix unit. Set TRITON_INTERPRET=1 before the
import of this module.
"""

import functools

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


def _convert_float(data, source, target, rounding):
    """bf16 and fp32 by shifts: the interpreter's own code takes every number apart. Without a rounding it truncates."""
    bits = np.ascontiguousarray(data)
    if (source, target) == (tl.bfloat16, tl.float32):
        return (bits.view(np.uint16).astype(np.uint32) << 16).reshape(data.shape)
    if (source, target, rounding) == (tl.float32, tl.bfloat16, None):
        return (bits.view(np.uint32) >> 16).astype(np.uint16).reshape(data.shape)
    return _convert(data, source, target, rounding)


def _patch_once(function) -> None:
    """The interpreter replaces the functions of Triton's language for good, and does so again at each call."""
    if not any(function.__globals__ is held for held in _patched):
        _patch(function)
        _patched.append(function.__globals__)


def _get_np_dtype(kind) -> np.dtype:
    """The interpreter makes a table of all types at each call."""
    kind = kind.scalar  # of a block: its elements' type
    return np.dtype(np.uint64) if isinstance(kind, tl.pointer_type) else _dtype_of(kind)


_dtype_of = functools.cache(interpreter._get_np_dtype)
_apply, _convert, _patch = interpreter.ReduceOps.apply_impl, interpreter._convert_float, interpreter._patch_lang
_patched: list[dict] = []  # the names of each module whose kernels ran


def install() -> None:
    """Replace the interpreter's dot, and what is slow in it, in this process."""
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter.ReduceOps.apply_impl = _reduce
    interpreter._convert_float = _convert_float
    interpreter._patch_lang = _patch_once
    interpreter._get_np_dtype = _get_np_dtype
