"""Causal convolutions over a few tokens: compiles and launches causal_conv.cu, which states shapes and order."""

from __future__ import annotations

import functools
from ctypes import c_int, c_longlong, c_void_p
from typing import TYPE_CHECKING, NamedTuple

from . import nvrtc

if TYPE_CHECKING:
    import torch

_THREADS = 128
_PER = 8  # tokens of a thread, in a step of prompts
KERNELS = ("convolve", "keep_inputs")


class Unfit(ValueError):
    """The kernels do not support a call's tensors; the message says why."""


class Form(NamedTuple):
    """What causal_conv.cu is compiled for.

    width: tokens of the convolution. gated: between two products, as in LFM2; else SiLU follows, as in Mamba 1.
    floats: whether the weights are fp32, not bf16.
    """

    channels: int
    width: int
    gated: bool
    floats: bool = False

    def defines(self) -> dict[str, object]:
        """The preprocessor macros of causal_conv.cu."""
        return {
            "CHANNELS": self.channels,
            "BEFORE": self.width - 1,
            "GATED": int(self.gated),
            "WEIGHT_FLOAT": int(self.floats),
            "THREADS": _THREADS,
            "PARTS": 1,
            "INPUT": '"bf16"',
            "CONTRACT": 1,
        }


def covers(channels: int, width: int) -> str:
    """What of these sizes the kernels do not support, in words, or ""."""
    if channels % 2:
        return f"{channels} channels; even numbers work"
    return "" if 2 <= width <= 8 else f"a convolution over {width} tokens; 2 to 8 work"


@functools.cache
def build(form: Form, arch: str, major: int) -> bytes:
    """Compile a cubin for `arch` (e.g. sm_90) with NVRTC of CUDA `major`. Raises nvrtc.CompileError."""
    return nvrtc.compile(nvrtc.source("primitives.h", "causal_conv.cu"), arch, form.defines(), major)


@functools.cache
def load(form: Form, kernel: str, device: int) -> nvrtc.Function:
    """A kernel, compiled and loaded on the device. Raises nvrtc.CompileError."""
    import torch

    cubin = build(form, *nvrtc.target(device))
    with torch.cuda.device(device):
        return nvrtc.Function(cubin, kernel, _THREADS, 0)


def prepare(form: Form, device: int) -> None:
    """Compile and load the kernels, so that no CUDA graph capture has to. Raises nvrtc.CompileError."""
    for kernel in KERNELS:
        load(form, kernel, device)


def run(
    form: Form,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor | None,
    fresh: torch.Tensor | None,
    which: torch.Tensor | None,
) -> torch.Tensor:
    """The convolution over x [tokens, channels] (bf16; gated: [tokens, 3 * channels]) -> [tokens, channels].

    conv [slots, width - 1, channels] bf16 is updated in place. slots int32 [requests]. starts int32 [requests + 1],
    fresh int8 [requests], which int32 [tokens]: see causal_conv.cu; all None in a step of one token a request. Raises
    Unfit before any work.
    """
    if problem := _unfit(form, x, weight, bias, conv, slots):
        raise Unfit(f"causal convolution: {problem}")
    import torch

    tokens, requests, device = len(x), len(slots), x.device.index
    out = torch.empty(tokens, form.channels, dtype=x.dtype, device=x.device)
    if not tokens or not requests:
        return out
    stream = torch.cuda.current_stream(x.device).cuda_stream
    per, across = 1 if starts is None else _PER, -(-form.channels // (2 * _THREADS))
    at = lambda *held: [c_void_p(None if t is None else t.data_ptr()) for t in held]  # noqa: E731
    slot, rows = c_longlong(conv.stride(0)), [c_int(x.stride(0)), c_int(conv.stride(1))]
    load(form, "convolve", device)(
        (-(-tokens // per), across),
        stream,
        [
            *at(x, weight, bias, conv, out, starts, slots, fresh, which),
            slot,
            *[c_int(n) for n in (tokens, requests, per)],
            *rows,
        ],
    )
    if starts is not None:
        load(form, "keep_inputs", device)((requests, across), stream, [*at(x, conv, starts, slots, fresh), slot, *rows])
    return out


def _unfit(form, x, weight, bias, conv, slots) -> str:
    """Why the kernels do not support these arguments; empty if they do."""
    import torch

    held = [t for t in (x, bias, conv) if t is not None]
    if any(t.dtype != torch.bfloat16 or t.stride(-1) != 1 for t in held):
        return "tensors are not in bf16, or elements do not lie side by side"
    if weight.dtype != (torch.float32 if form.floats else torch.bfloat16):
        return f"weights in {weight.dtype}"
    if x.shape[1] != form.channels * (3 if form.gated else 1) or tuple(weight.shape) != (form.channels, form.width):
        return f"{tuple(x.shape)} inputs and weights {tuple(weight.shape)}"
    if tuple(conv.shape[1:]) != (form.width - 1, form.channels) or not weight.is_contiguous():
        return f"states {tuple(conv.shape)}, or a weight that is not dense"
    if any(t.data_ptr() % 4 or t.stride(0) % 2 for t in (x, conv)) or conv.stride(1) % 2:
        return "rows are not aligned to 4 bytes"
    if slots.dtype != torch.int32 or not slots.is_contiguous() or len(slots) > nvrtc.MOST_BLOCKS:
        return "slots are not int32, side by side, or too many"
    return ""
