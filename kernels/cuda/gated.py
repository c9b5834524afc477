"""Forms of SwiGLU: compiles and launches gated.cu, which states shapes and roundings."""

from __future__ import annotations

import functools
from ctypes import _SimpleCData, c_float, c_longlong, c_uint, c_void_p
from typing import TYPE_CHECKING, NamedTuple

from . import nvrtc

if TYPE_CHECKING:
    import torch

_THREADS = 256
_EACH = 8  # elements of a thread
MOST = 1 << 35  # elements of x: the kernel counts threads in 31 bits


class Form(NamedTuple):
    """What gated.cu is compiled for. brain: bf16, not fp16. scaled: with a factor."""

    columns: int
    brain: bool
    scaled: bool = False

    def defines(self) -> dict[str, object]:
        """The preprocessor macros of gated.cu."""
        return {
            "COLUMNS": self.columns,
            "SCALED": int(self.scaled),
            "THREADS": _THREADS,
            "PARTS": 1,
            "BRAIN": int(self.brain),
            "INPUT": '"bf16"' if self.brain else '"f16"',
            "CONTRACT": 1,
        }


def covers(columns: int, dtype: torch.dtype) -> bool:
    """Whether the kernel takes gates of `columns` elements of this type."""
    import torch

    return columns > 0 and columns % _EACH == 0 and dtype in (torch.bfloat16, torch.float16)


@functools.cache
def build(form: Form, arch: str, major: int) -> bytes:
    """Compile a cubin for `arch` (e.g. sm_90) with NVRTC of CUDA `major`. Raises nvrtc.CompileError."""
    return nvrtc.compile(nvrtc.source("primitives.h", "gated.cu"), arch, form.defines(), major)


@functools.cache
def load(form: Form, kernel: str, device: int) -> nvrtc.Function:
    """A kernel of gated.cu, compiled and loaded on the device. Raises nvrtc.CompileError."""
    import torch

    with torch.cuda.device(device):
        return nvrtc.Function(build(form, *nvrtc.target(device)), kernel, _THREADS, 0)


def run(x: torch.Tensor, factor: float, adds_zero: bool) -> torch.Tensor:
    """silu(factor * x[:, :C]) * x[:, C:] of x [tokens, 2 C], which `covers`, -> [tokens, C] of x's type.

    adds_zero: -0 in x[:, C:] counts as 0. Raises nvrtc.CompileError, and ValueError for x of MOST elements or more.
    """
    import torch

    out = torch.empty(len(x), x.shape[1] // 2, dtype=x.dtype, device=x.device)
    _launch("gated_silu", x, out, factor != 1, c_float(factor), c_uint(0 if adds_zero else 0x80008000))
    return out


def run_pairs(x: torch.Tensor, out: torch.Tensor, alpha: float, limit: float) -> None:
    """Write gpt-oss's SwiGLU of pairs x [rows, 2 C] to out [rows, C], dense and aligned to 16 bytes. `covers` both.

    Raises nvrtc.CompileError, and ValueError for x of MOST elements or more.
    """
    _launch("clamped_pairs", x, out, False, c_float(alpha), c_float(limit))


def _launch(kernel: str, x: torch.Tensor, out: torch.Tensor, scaled: bool, *more: _SimpleCData) -> None:
    import torch

    rows, columns = out.shape
    if x.numel() >= MOST:
        raise ValueError(f"x of {rows} x {2 * columns} has too many elements")
    if not rows:
        return
    if x.stride(1) != 1 or x.stride(0) % _EACH or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    load(Form(columns, x.dtype == torch.bfloat16, scaled), kernel, x.device.index)(
        (-(-rows * columns // (_EACH * _THREADS)), 1),
        torch.cuda.current_stream(x.device).cuda_stream,
        [c_void_p(x.data_ptr()), c_void_p(out.data_ptr()), c_longlong(x.stride(0)), c_uint(rows), *more],
    )
