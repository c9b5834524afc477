"""Kimi delta attention's recurrence on CUDA by bundled kernels (kernels/cuda/kda.cu)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bi_patch.ops.cuda.recurrent import Spans


def uncovered(size: int, width: int) -> str:
    """What of the elements of a head and the tokens of the convolution the kernels do not compute, in words, or ""."""
    from bi_patch.kernels.cuda import kda

    return kda.covers(size, width)


def prepare(heads: int) -> str:
    """Compile and load the kernels for the current device: no capture of a CUDA graph may. Returns what failed."""
    import torch

    from bi_patch.kernels.cuda import kda, nvrtc

    try:
        kda.prepare(heads, torch.cuda.current_device())
    except nvrtc.CompileError as error:
        return str(error)
    return ""


def run(out, y, gate, beta, rate, dt_bias, states, spans: Spans) -> None:
    """The recurrence of a layer's step; arguments as in kernels/cuda/kda.py."""
    from bi_patch.kernels.cuda import kda

    kda.run(out, y, gate, beta, rate, dt_bias, states, spans.slots, spans.starts, spans.fresh)
