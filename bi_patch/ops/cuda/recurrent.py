"""Gated delta nets and Mamba 2 on CUDA by bundled kernels, in chunks at fixed positions (kernels/cuda/recurrent.cu)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bi_patch.ops.registration import define

if TYPE_CHECKING:
    import torch

    from bi_patch.kernels.cuda.recurrent import Form, Segments


@dataclass(frozen=True)
class Spans:
    """The requests of a step.

    slots: int32 [requests], the state of each request; 0 and below are skipped. starts: int32 [requests + 1], the first
    token of each request. fresh: int8 [requests], 1 where a request starts at position 0. which: int32 [tokens], the
    request of a token. segments: of long prompts. In a step of one token a request, all but slots are None.
    """

    slots: torch.Tensor
    starts: torch.Tensor | None = None
    fresh: torch.Tensor | None = None
    which: torch.Tensor | None = None
    segments: Segments | None = None


def spans(slots: torch.Tensor, starts: torch.Tensor, fresh: torch.Tensor, tokens: int, prompts: int = 0) -> Spans:
    """Spans of a step in which prompts run. starts [requests + 1] and slots [requests] of any int dtype. prompts: the
    number of requests that are no decodes, if long ones may be cut into segments."""
    import torch

    from bi_patch.kernels.cuda.recurrent import cut

    starts = starts.to(torch.int32).contiguous()
    at = torch.arange(tokens, dtype=torch.int32, device=slots.device)
    which = torch.searchsorted(starts[1:].contiguous(), at, right=True, out_int32=True)
    held = slots.to(torch.int32).contiguous(), starts, fresh.to(torch.int8).contiguous(), which
    return Spans(*held, cut(starts, tokens, prompts) if prompts else None)


def form(mamba: bool, keys: int, values: int, key_heads: int, heads: int, rate, dt_bias, skip) -> Form:
    """What the kernels are compiled for, for a layer with these sizes and parameters (skip: D, or None)."""
    import torch

    from bi_patch.kernels.cuda.recurrent import Form

    floats = tuple(t is not None and t.dtype == torch.float32 for t in (rate, dt_bias, skip))
    return Form(mamba, keys, values, key_heads, heads, floats)


def inputs_of(form: Form) -> tuple[int, int]:
    """The shape of a slot's inputs, with what is kept beside them: (rows, channels)."""
    return form.kept, form.channels


def kept(mamba: bool, inputs: tuple[int, int], state: tuple[int, int, int]) -> tuple[int, int]:
    """The shape of a slot's inputs, with what the kernels keep beside them. inputs: (rows, channels) of the
    convolution. state: (heads, values, keys). Sizes that the kernels do not support keep their shape."""
    from bi_patch.kernels.cuda.recurrent import Form, covers

    rows, channels = inputs
    heads, values, keys = state
    key_heads, rest = divmod(channels - heads * values, 2 * keys)
    if rest or key_heads < 1 or covers(keys, values, key_heads, heads, rows + 1):
        return inputs
    return inputs_of(Form(mamba, keys, values, key_heads, heads, (True, False, False)))


def uncovered(keys: int, values: int, key_heads: int, heads: int, width: int) -> str:
    """What of these sizes the kernels do not compute, in words, or ""."""
    from bi_patch.kernels.cuda.recurrent import covers

    return covers(keys, values, key_heads, heads, width)


def prepare(form: Form) -> str:
    """Compile and load the kernels for the current device: no capture of a CUDA graph may. Returns what failed."""
    import torch

    from bi_patch.kernels.cuda import nvrtc, recurrent

    try:
        recurrent.prepare(form, torch.cuda.current_device())
    except nvrtc.CompileError as error:
        return str(error)
    return ""


def run(form, out, x, weight, bias, a, b, rate, dt_bias, skip, conv, states, spans: Spans) -> None:
    """The convolution and the recurrence of a layer's step; arguments as in kernels/cuda/recurrent.py."""
    from bi_patch.kernels.cuda import recurrent

    step = spans.slots, spans.starts, spans.fresh, spans.which, spans.segments
    recurrent.run(form, out, x, weight, bias, a, b, rate, dt_bias, skip, conv, states, *step)


def define_ops() -> None:
    """Define torch.ops.bi_patch.gated_rms_norm and .gated_first_rms_norm. A second call does nothing."""
    define(
        "gated_rms_norm(Tensor x, Tensor gate, Tensor weight, float eps, bool sigmoid) -> Tensor",
        _gated_norm,
        "CUDA",
        lambda x, *_: x.new_empty(x.shape),
    )
    define(
        "gated_first_rms_norm(Tensor x, Tensor gate, Tensor weight, float eps, int groups) -> Tensor",
        _gated_first,
        "CUDA",
        lambda x, *_: x.new_empty(x.shape),
    )


def gated_rms_norm(x, gate, weight, eps: float, sigmoid: bool) -> torch.Tensor:
    """RMSNorm of x [..., C] times weight [C] times f(gate [..., C]) -> [..., C]. f is SiLU, or the sigmoid."""
    import torch

    return torch.ops.bi_patch.gated_rms_norm(x, gate, weight, eps, sigmoid)


def gated_first_rms_norm(x, gate, weight, eps: float, groups: int) -> torch.Tensor:
    """RMSNorm of each of the groups of x [tokens, C] times SiLU(gate [tokens, C]), times weight [C] -> [tokens, C]."""
    import torch

    return torch.ops.bi_patch.gated_first_rms_norm(x, gate, weight, eps, groups)


def _gated_norm(x, gate, weight, eps, sigmoid):
    from bi_patch.kernels.triton import recurrent

    return recurrent.gated_norm(x, gate, weight, eps, sigmoid)


def _gated_first(x, gate, weight, eps, groups):
    from bi_patch.kernels.triton import recurrent

    return recurrent.gated_first_norm(x, gate, weight, eps, groups)
