"""Mamba 1's recurrence on CUDA by a bundled kernel (kernels/cuda/mamba1.cu)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from bi_patch.ops.cuda.recurrent import Spans


def uncovered(states: int) -> str:
    """What of this number of states of a channel the kernel does not compute, in words, or ""."""
    from bi_patch.kernels.cuda import mamba1

    return mamba1.covers(states)


def prepare(channels: int, states: int) -> str:
    """Compile and load the kernel for the current device: no capture of a CUDA graph may. Returns what failed."""
    import torch

    from bi_patch.kernels.cuda import mamba1, nvrtc

    try:
        mamba1.load(mamba1.Form(channels, states), torch.cuda.current_device())
    except nvrtc.CompileError as error:
        return str(error)
    return ""


def run(x, dt, b, c, gate, rate, skip, dt_bias, states, spans: Spans) -> torch.Tensor:
    """The recurrence of a layer's step; arguments as in kernels/cuda/mamba1.py, rows of b and c aligned or not."""
    from bi_patch.kernels.cuda import mamba1

    b, c = (t if t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 else t.contiguous() for t in (b, c))
    step = spans.slots, spans.starts, spans.fresh
    return mamba1.run(x, dt, b, c, gate, rate, skip, dt_bias, states, *step)
