"""Mamba 1's recurrence: compiles and launches mamba1.cu, which states shapes and order."""

from __future__ import annotations

import functools
from ctypes import c_int, c_longlong, c_void_p
from typing import TYPE_CHECKING, NamedTuple

from . import nvrtc

if TYPE_CHECKING:
    import torch

_THREADS = 64


class Unfit(ValueError):
    """The kernel does not support a call's tensors; the message says why."""


class Form(NamedTuple):
    """What mamba1.cu is compiled for. states: of a channel."""

    channels: int
    states: int

    def defines(self) -> dict[str, object]:
        """The preprocessor macros of mamba1.cu."""
        return {
            "CHANNELS": self.channels,
            "STATES": self.states,
            "THREADS": _THREADS,
            "PARTS": 1,
            "INPUT": '"bf16"',
            "CONTRACT": 1,
        }


def covers(states: int) -> str:
    """What of this number of states of a channel the kernel does not support, in words, or ""."""
    return "" if states in (8, 16, 32) else f"{states} states of a channel; 8, 16 and 32 work"


@functools.cache
def build(form: Form, arch: str, major: int) -> bytes:
    """Compile a cubin for `arch` (e.g. sm_90) with NVRTC of CUDA `major`. Raises nvrtc.CompileError."""
    return nvrtc.compile(nvrtc.source("primitives.h", "mamba1.cu"), arch, form.defines(), major)


@functools.cache
def load(form: Form, device: int) -> nvrtc.Function:
    """The kernel, compiled and loaded on the device. Raises nvrtc.CompileError."""
    import torch

    cubin = build(form, *nvrtc.target(device))
    with torch.cuda.device(device):
        return nvrtc.Function(cubin, "scan", _THREADS, 0)


def run(
    x: torch.Tensor,
    dt: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    gate: torch.Tensor,
    rate: torch.Tensor,
    skip: torch.Tensor,
    dt_bias: torch.Tensor | None,
    states: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor | None,
    fresh: torch.Tensor | None,
) -> torch.Tensor:
    """The recurrence over x [tokens, channels] (bf16) -> [tokens, channels].

    dt, gate as x; b, c [tokens, states] bf16; rate [channels, states], skip, dt_bias [channels] fp32. states fp32
    [slots, channels, states] is updated in place. slots int32 [requests], starts int32 [requests + 1], fresh int8
    [requests]; both None in a step of one token a request. Raises Unfit before any work.
    """
    form = Form(x.shape[1], b.shape[1])
    if problem := _unfit(form, (x, dt, gate), (b, c), (rate, skip, dt_bias), states, slots):
        raise Unfit(f"Mamba 1: {problem}")
    import torch

    out = torch.empty(len(x), form.channels, dtype=x.dtype, device=x.device)
    if not len(x) or not len(slots):
        return out
    at = lambda *held: [c_void_p(None if t is None else t.data_ptr()) for t in held]  # noqa: E731
    load(form, x.device.index)(
        (-(-form.channels // _THREADS), len(slots)),
        torch.cuda.current_stream(x.device).cuda_stream,
        [
            *at(x, dt, b, c, gate, rate, skip, dt_bias, states, out, starts, slots, fresh),
            c_longlong(states.stride(0)),
            *[c_int(t.stride(0)) for t in (x, dt, b, c, gate)],
        ],
    )
    return out


def _unfit(form, wide, narrow, parameters, states, slots) -> str:
    """Why the kernel does not support these arguments; empty if it does."""
    import torch

    if any(t.dtype != torch.bfloat16 or t.stride(1) != 1 for t in (*wide, *narrow)):
        return "tokens are not in bf16, or elements do not lie side by side"
    if any(t.shape != wide[0].shape for t in wide) or any(t.shape[1] != form.states for t in narrow):
        return "tensors of other shapes"
    if any(t.data_ptr() % 16 or t.stride(0) % 8 for t in narrow):
        return "rows of b and c are not aligned to 16 bytes"
    if any(t is not None and (t.dtype != torch.float32 or not t.is_contiguous()) for t in parameters):
        return "parameters are not in fp32, or not dense"
    if states.dtype != torch.float32 or tuple(states.shape[1:]) != form or not states[0].is_contiguous():
        return f"states {tuple(states.shape)} in {states.dtype}"
    if states.data_ptr() % 16 or states.stride(0) % 4 or parameters[0].data_ptr() % 16:
        return "states or rates are not aligned to 16 bytes"
    if slots.dtype != torch.int32 or not slots.is_contiguous() or len(slots) > nvrtc.MOST_BLOCKS:
        return "slots are not int32, side by side, or too many"
    return ""
