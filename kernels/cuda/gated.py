"""SwiGLU with a factor of its gate: compiles and launches gated.cu, which states shapes and roundings."""

from __future__ import annotations

import functools
from ctypes import c_float, c_longlong, c_void_p
from typing import TYPE_CHECKING, NamedTuple

from . import nvrtc

if TYPE_CHECKING:
    import torch

_THREADS = 256
_EACH = 8  # elements of a thread


class Form(NamedTuple):
    """What gated.cu is compiled for. brain: bf16, not fp16."""

    columns: int
    brain: bool

    def defines(self) -> dict[str, object]:
        """The preprocessor macros of gated.cu."""
        return {
            "COLUMNS": self.columns,
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
def load(form: Form, device: int) -> nvrtc.Function:
    """The kernel, compiled and loaded on the device. Raises nvrtc.CompileError."""
    import torch

    with torch.cuda.device(device):
        return nvrtc.Function(build(form, *nvrtc.target(device)), "gated_silu", _THREADS, 0)


def run(x: torch.Tensor, factor: float) -> torch.Tensor:
    """silu(factor * x[:, :C]) * x[:, C:] of x [tokens, 2 C], which `covers`, -> [tokens, C] of x's type.

    Raises nvrtc.CompileError.
    """
    import torch

    tokens, columns = len(x), x.shape[1] // 2
    out = torch.empty(tokens, columns, dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    if x.stride(1) != 1 or x.stride(0) % _EACH or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    at = [c_void_p(t.data_ptr()) for t in (x, out)]
    load(Form(columns, x.dtype == torch.bfloat16), x.device.index)(
        (tokens, -(-columns // (_EACH * _THREADS))),
        torch.cuda.current_stream(x.device).cuda_stream,
        [*at, c_longlong(x.stride(0)), c_float(factor)],
    )
    return out
