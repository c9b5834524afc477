"""What the kernels of recurrent layers share: sizes that they support, and checks of a call's tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

WIDTH = 4  # tokens of the convolution
PER = 8  # tokens of a warp in `prepare`, in a step of prompts
PREPARE = 128  # threads of a block of `prepare` and `keep_inputs`
SPREAD = 132 * 8  # warps that keep a device busy: with fewer, a warp gets fewer rows
_KEYS, _VALUES = (64, 128, 256), (64, 128, 256)


class Unfit(ValueError):
    """The kernels do not support a call's tensors; the message says why."""


class Sizes(Protocol):
    """Of a layer: what a call's tensors must have. kept: rows of a slot's `conv`."""

    keys: int
    values: int
    heads: int
    channels: int
    kept: int


def covers(keys: int, values: int, key_heads: int, heads: int, width: int) -> str:
    """What of these sizes the kernels do not support, in words, or ""."""
    if keys not in _KEYS or values not in _VALUES or heads % key_heads:
        return f"heads of {keys} keys and {values} values, {key_heads} and {heads}; sizes of 64, 128 and 256 work"
    return "" if width == WIDTH else f"a convolution over {width} tokens; {WIDTH} work"


def target(device: int) -> tuple[str, int]:
    """What kernels for this device are compiled for: the architecture (e.g. sm_90), and CUDA's major version."""
    import torch

    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return arch, int(str(torch.version.cuda).split(".")[0])


def unfit(
    form: Sizes,
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor | None,
    conv: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    *,
    logged: bool,
) -> str:
    """Why the kernels do not support these arguments of `run`; empty if they do.

    logged: a slot keeps more than the convolution's inputs.
    """
    import torch

    held = [t for t in (out, x, weight, bias, a, b, conv) if t is not None]
    if any(t.dtype != torch.bfloat16 or t.stride(-1) != 1 for t in held) or states.dtype != torch.float32:
        return "inputs are not in bf16, or states not in fp32, or elements do not lie side by side"
    if tuple(states.shape[1:]) != (form.heads, form.values, form.keys) or not states[0].is_contiguous():
        return f"states {tuple(states.shape)} are not {form}"
    if x.shape[1] != form.channels or tuple(conv.shape[1:]) != (form.kept, form.channels):
        return f"{tuple(x.shape)} inputs over {tuple(conv.shape)}"
    if not out.is_contiguous() or not weight.is_contiguous() or out.numel() != len(x) * form.heads * form.values:
        return "out or weight is not dense"
    if any(t.data_ptr() % 4 or t.stride(0) % 2 for t in (x, conv)) or conv.stride(1) % 2:
        return "rows of inputs are not aligned to 4 bytes"
    if logged and (conv.stride(1) != form.channels or conv.data_ptr() % 16 or conv.stride(0) % 8):
        return "inputs of a slot are not dense and aligned to 16 bytes"
    if states.data_ptr() % 16 or states.stride(0) % 4 or out.data_ptr() % 16:
        return "states or out are not aligned to 16 bytes"
    if slots.dtype != torch.int32 or not slots.is_contiguous() or len(slots) > 65535:
        return "slots are not int32, side by side, or too many"
    return ""
