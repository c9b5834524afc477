"""Kimi delta attention's recurrence: compiles and launches kda.cu, which states shapes and order.

The bits are the same for every tile (`rows`), so the number of requests may choose it.
"""

from __future__ import annotations

import functools
from ctypes import c_int, c_longlong, c_void_p
from typing import TYPE_CHECKING, NamedTuple

from . import nvrtc

if TYPE_CHECKING:
    import torch

SIZE = 128  # keys, and values, of a head
WIDTH = 4  # tokens of the convolution before
_WARPS = 4  # of a block
_FEW, _MANY = 2, 4  # rows of a thread, with few and with many requests
_SPREAD = 132 * 8  # warps that keep a device busy: with fewer, a thread gets fewer rows
KERNELS = ("prepare", "scan")


class Unfit(ValueError):
    """The kernels do not support a call's tensors; the message says why."""


class Form(NamedTuple):
    """What kda.cu is compiled for. rows: of a state, of a thread of `scan`, which change no bit."""

    heads: int
    rows: int = _MANY

    @property
    def parts(self) -> int:
        """Blocks of a head."""
        return SIZE // (4 * self.rows * _WARPS)

    def defines(self) -> dict[str, object]:
        """The preprocessor macros of kda.cu."""
        return {
            "HEADS": self.heads,
            "ROWS": self.rows,
            "SCALE": f"{SIZE**-0.5!r}f",
            "WARPS": _WARPS,
            "THREADS": 32 * _WARPS,
            "PARTS": 1,
            "INPUT": '"bf16"',
            "CONTRACT": 1,
        }


def covers(size: int, width: int) -> str:
    """What of the elements of a head and the tokens of the convolution the kernels do not support, in words, or ""."""
    if size != SIZE:
        return f"heads of {size} elements; {SIZE} work"
    return "" if width == WIDTH else f"a convolution over {width} tokens; {WIDTH} work"


def choose(heads: int, requests: int) -> Form:
    """The form for a step of `requests` requests. It changes no bit."""
    many = Form(heads)
    return many if requests * heads * many.parts * _WARPS >= _SPREAD else Form(heads, _FEW)


@functools.cache
def build(form: Form, arch: str, major: int) -> bytes:
    """Compile a cubin for `arch` (e.g. sm_90) with NVRTC of CUDA `major`. Raises nvrtc.CompileError."""
    return nvrtc.compile(nvrtc.source("primitives.h", "kda.cu"), arch, form.defines(), major)


@functools.cache
def load(form: Form, kernel: str, device: int) -> nvrtc.Function:
    """A kernel, compiled and loaded on the device. Raises nvrtc.CompileError."""
    import torch

    cubin = build(form, *nvrtc.target(device))
    with torch.cuda.device(device):
        return nvrtc.Function(cubin, kernel, 32 * _WARPS, 0)


def prepare(heads: int, device: int) -> None:
    """Compile and load the kernels of a layer, so that no CUDA graph capture has to. Raises nvrtc.CompileError."""
    for form in (Form(heads), Form(heads, _FEW)):
        for kernel in KERNELS:
            load(form, kernel, device)


def run(
    out: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    beta: torch.Tensor,
    rate: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor | None,
    fresh: torch.Tensor | None,
) -> None:
    """The recurrence over y [tokens, 3 * heads * 128] (bf16: q, k, v), into out [tokens, heads, 128], dense.

    gate [tokens, heads * 128], beta [tokens, heads]: bf16, before softplus and sigmoid. rate [heads] (A_log), dt_bias
    [heads * 128]: fp32. states fp32 [slots, heads, values, keys] is updated in place. slots int32 [requests], starts
    int32 [requests + 1], fresh int8 [requests]; both None in a step of one token a request. Raises Unfit before any
    work.
    """
    tokens, heads = beta.shape
    if problem := _unfit(heads, out, y, gate, beta, rate, dt_bias, states, slots):
        raise Unfit(f"Kimi delta attention: {problem}")
    import torch

    requests, device = len(slots), y.device.index
    if not tokens or not requests:
        return
    stream, form = torch.cuda.current_stream(y.device).cuda_stream, choose(heads, requests)
    decays = torch.empty(tokens, heads, SIZE, dtype=torch.float32, device=y.device)
    numbers = torch.empty(tokens, heads, 4, dtype=torch.float32, device=y.device)
    at = lambda *held: [c_void_p(None if t is None else t.data_ptr()) for t in held]  # noqa: E731
    load(form, "prepare", device)(
        (-(-tokens * heads // _WARPS), 1),
        stream,
        [
            *at(y, gate, beta, rate, dt_bias, decays, numbers),
            *[c_int(n) for n in (tokens, gate.stride(0), beta.stride(0))],
        ],
    )
    load(form, "scan", device)(
        (heads * form.parts, requests),
        stream,
        [*at(y, decays, numbers, states, out, starts, slots, fresh), c_longlong(states.stride(0))],
    )


def _unfit(heads, out, y, gate, beta, rate, dt_bias, states, slots) -> str:
    """Why the kernels do not support these arguments of `run`; empty if they do."""
    import torch

    if any(t.dtype != torch.bfloat16 or t.stride(-1) != 1 for t in (out, y, gate, beta)):
        return "tokens are not in bf16, or elements do not lie side by side"
    wide = heads * SIZE
    if tuple(y.shape) != (len(beta), 3 * wide) or tuple(gate.shape) != (len(beta), wide) or not y.is_contiguous():
        return f"{tuple(y.shape)} inputs and {tuple(gate.shape)} gates of {heads} heads"
    if not out.is_contiguous() or out.numel() != len(beta) * wide or y.data_ptr() % 8:
        return "out or inputs are not dense, or inputs not aligned to 8 bytes"
    if any(t.dtype != torch.float32 or not t.is_contiguous() for t in (rate, dt_bias)):
        return "parameters are not in fp32, or not dense"
    if rate.numel() != heads or dt_bias.numel() != wide or dt_bias.data_ptr() % 16:
        return "parameters have other sizes, or are not aligned to 16 bytes"
    if states.dtype != torch.float32 or tuple(states.shape[1:]) != (heads, SIZE, SIZE) or not states[0].is_contiguous():
        return f"states {tuple(states.shape)} in {states.dtype}"
    if states.data_ptr() % 16 or states.stride(0) % 4:
        return "states are not aligned to 16 bytes"
    if slots.dtype != torch.int32 or not slots.is_contiguous() or len(slots) > nvrtc.MOST_BLOCKS:
        return "slots are not int32, side by side, or too many"
    return ""
