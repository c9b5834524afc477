"""Attention of single queries over paged KV: decode.cu, which states the order, compiled and launched."""

from __future__ import annotations

import functools
from ctypes import c_float, c_int, c_longlong, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

from . import nvrtc

if TYPE_CHECKING:
    import torch

HEAD_SIZES = (64, 128)
GROUP = 16  # most query heads a key head
_THREADS, _TILE, _STAGES = 128, 128, 3
_LOG2E = 1.4426950408889634
_INPUTS = {"bfloat16": "bf16", "float16": "f16"}
# Whether the tile's scale and first weight join a partial sum in one rounding: so FlashAttention 3 was compiled.
_CONTRACT = 1


def covers(heads: int, key_heads: int, head_size: int, dtype: torch.dtype) -> bool:
    """Whether the kernel has these sizes; dtype is that of q, k, v and the output."""
    name = str(dtype).removeprefix("torch.")
    return head_size in HEAD_SIZES and name in _INPUTS and heads % key_heads == 0 and heads // key_heads <= GROUP


def build(head_size: int, dtype: torch.dtype, arch: str, major: int) -> bytes:
    """The cubin for `arch`, e.g. sm_90, by NVRTC of CUDA `major`. Raises nvrtc.CompileError."""
    folder = Path(__file__).resolve().parent
    source = (folder / "primitives.h").read_text() + (folder / "decode.cu").read_text()
    name = _INPUTS[str(dtype).removeprefix("torch.")]
    defines = {"HEAD": head_size, "STAGES": _STAGES, "INPUT": f'"{name}"', "CONTRACT": _CONTRACT}
    return nvrtc.compile(source, arch, defines, major)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    pages: torch.Tensor,
    scale: float,
) -> None:
    """Write the attention of q [tokens, heads, D] over each request's first `lengths` tokens into out, of q's shape.

    k, v: [pages, page size, key heads, D], the page size a power of two. starts [requests + 1], int32: a request's
    token in q; a request without token has its next start equal. lengths [requests], int32. pages [requests, most
    pages], int32. scale: of the softmax. Raises ValueError for what does not fit.
    """
    heads, size = q.shape[1:]
    page_size, key_heads = k.shape[1:3]
    if problem := _unfit(q, k, v, out, pages):
        raise ValueError(problem)
    strides = (*q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *out.stride()[:2])
    arguments = [
        *(c_void_p(x.data_ptr()) for x in (q, k, v, out, starts, lengths, pages)),
        c_int(pages.stride(0)), c_int(page_size.bit_length() - 1), c_int(heads // key_heads),
        c_float(c_float(scale).value * _LOG2E),
        *(c_longlong(stride) for stride in strides),
    ]  # fmt: skip
    import torch

    stream = torch.cuda.current_stream(q.device).cuda_stream
    _kernel(size, q.dtype, q.device.index)((key_heads, lengths.shape[0]), stream, arguments)


def _unfit(q, k, v, out, pages) -> str:
    """What in the arguments the kernel cannot take, or nothing."""
    if not covers(q.shape[1], k.shape[2], q.shape[2], q.dtype) or any(x.dtype != q.dtype for x in (k, v, out)):
        return f"decode: heads {tuple(q.shape[1:])} over {k.shape[2]} in {q.dtype} are not covered"
    if k.shape[1] & (k.shape[1] - 1):
        return f"decode: pages of {k.shape[1]} tokens are not covered"
    if any(x.stride(-1) != 1 for x in (q, k, v, out, pages)):
        return "decode: elements of a head, or a row's pages, do not lie side by side"
    if any((x.data_ptr() | 2 * x.stride(i)) % 16 for x in (k, v) for i in range(3)):
        return "decode: rows of KV are not aligned to 16 bytes"
    return "decode: rows are not aligned to 4 bytes" if any(x.data_ptr() % 4 for x in (q, out)) else ""


@functools.cache
def _kernel(head_size: int, dtype: torch.dtype, device: int) -> nvrtc.Function:
    import torch

    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    cubin = build(head_size, dtype, arch, int(str(torch.version.cuda).split(".")[0]))
    shared = 2 * _STAGES * _TILE * head_size * 2 + GROUP * _TILE * 2 + GROUP * (_TILE + 8) * 4 + 4 * GROUP * 4
    with torch.cuda.device(device):
        return nvrtc.Function(cubin, "decode", _THREADS, shared)
