"""Causal convolutions over a few tokens on CUDA, by a bundled kernel (kernels/cuda/causal_conv.cu)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from bi_patch.ops.cuda.recurrent import Spans


def uncovered(channels: int, width: int) -> str:
    """What of these sizes the kernels do not compute, in words, or ""."""
    from bi_patch.kernels.cuda import causal_conv

    return causal_conv.covers(channels, width)


def prepare(channels: int, width: int, gated: bool, floats: bool = False) -> str:
    """Compile and load the kernels for the current device: no capture of a CUDA graph may. Returns what failed.
    floats: whether the weights are fp32, not bf16."""
    import torch

    from bi_patch.kernels.cuda import causal_conv, nvrtc

    try:
        causal_conv.prepare(causal_conv.Form(channels, width, gated, floats), torch.cuda.current_device())
    except nvrtc.CompileError as error:
        return str(error)
    return ""


def run(x, weight, bias, conv, spans: Spans, gated: bool) -> torch.Tensor:
    """The convolution of a layer's step: weight [channels, width] -> [tokens, channels]; see kernels/cuda."""
    import torch

    from bi_patch.kernels.cuda import causal_conv

    form = causal_conv.Form(*weight.shape, gated, weight.dtype == torch.float32)
    return causal_conv.run(form, x, weight, bias, conv, spans.slots, spans.starts, spans.fresh, spans.which)
