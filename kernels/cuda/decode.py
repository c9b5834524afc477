"""Decode attention over paged KV: compiles and launches decode.cu, which states shapes, order and limits.

The bits are the same in every form, so the number of requests and their lengths may choose it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_int, c_longlong, c_void_p
from typing import TYPE_CHECKING, NamedTuple

from . import nvrtc

if TYPE_CHECKING:
    import torch

# Head size -> keys of a tile, as in FlashAttention 3's causal prefill of 16-bit types on Hopper (hopper/tile_size.h).
TILES = {64: 128, 128: 128, 256: 80}
HEAD_SIZES = tuple(TILES)
GROUP = 16  # most query heads per key head
_MOST_SCORERS = 8
_LOG2E = 1.4426950408889634
_INPUTS = {"bfloat16": "bf16", "float16": "f16"}
EIGHTHS = "float8_e4m3fn"  # the other type that the cache may have
# 1: a partial sum's rescale and the tile's first addition are one FMA, as FlashAttention 3 was compiled.
_CONTRACT = 1


class Unfit(ValueError):
    """The kernel does not support a call's tensors; the message says why."""


def covers(heads: int, key_heads: int, head_size: int, dtype: torch.dtype, cache: torch.dtype | None = None) -> bool:
    """Whether the kernel supports these numbers of heads, this head size, this dtype of q and the output, and this
    dtype of k and v, by default the same."""
    held = cache in (None, dtype) or _name(cache) == EIGHTHS
    grouped = heads % key_heads == 0 and heads // key_heads <= GROUP
    return head_size in HEAD_SIZES and _name(dtype) in _INPUTS and held and grouped


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def covers_pages(page_size: int) -> bool:
    """Whether the kernel supports pages of page_size tokens: a power of two, of the sizes that a GPU compared."""
    return 16 <= page_size <= 4096 and page_size & (page_size - 1) == 0


class Form(NamedTuple):
    """What decode.cu is compiled for.

    group: query heads per key head. parts: blocks of a cluster. scorers, summers, carriers: warps of a block that
    score, sum V and copy V. apart: the summers, at most two, have a quarter of the multiprocessor alone. shares: 0 for
    a 16-bit cache; for an e4m3 cache, the carriers that share a tile. late: the summers convert an e4m3 cache's V, and
    not the carriers; then a tile has one carrier.
    """

    head_size: int
    group: int
    parts: int
    scorers: int
    summers: int
    carriers: int
    apart: bool = False
    shares: int = 0
    late: bool = False

    @property
    def halves(self) -> int:
        """Eights of query rows in a block."""
        return 1 if self.group <= 8 else 2

    @property
    def tile(self) -> int:
        """Keys of a tile."""
        return TILES[self.head_size]

    @property
    def columns(self) -> int:
        """Columns of V that a block sums."""
        return self.head_size // self.parts

    def defines(self) -> dict[str, int]:
        """The preprocessor macros of decode.cu."""
        own = {"EIGHTHS": 1, "SHARES": self.shares} if self.shares else {"EIGHTHS": 0}
        if self.late and self.parts == 1:
            own["RESIDENT"] = 2  # blocks of a multiprocessor
        return own | {
            "HEAD": self.head_size,
            "TILE": self.tile,
            "PARTS": self.parts,
            "HALVES": self.halves,
            "SCORERS": self.scorers,
            "SUMMERS": self.summers,
            "CARRIERS": self.carriers,
            "APART": int(self.apart),
            "LATE": int(self.late),
        }

    @property
    def threads(self) -> int:
        """Threads of a block. Summers apart are warps 3 and 7, so some warps may have no work."""
        return 32 * max(self.scorers + self.summers + self.carriers, 4 * self.summers if self.apart else 0)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: a scorer's tile of K and its slot in every block, queries of an e4m3 form, 128
        bytes at the end."""
        keys = self.tile * (1 if self.shares else 2) * self.head_size + 5 * GROUP * 4 + 3 * 8
        loads = -(-self.tile // (32 // self.halves))
        slot = self.tile * (1 if self.late else 2) * self.columns + loads * 512 + GROUP * 4 + 2 * 8
        queries = self.head_size * 32 if self.shares else 0
        return self.scorers * (-(-keys // 128) * 128 + self.parts * (-(-slot // 128) * 128)) + queries + 128


class Choice(NamedTuple):
    """A form's numbers, as in Form. least: keys of the longest request from which on the form may serve."""

    least: int
    parts: int
    scorers: int
    summers: int
    carriers: int
    apart: bool = False
    shares: int = 0
    late: bool = False


# By a GPU's measurements (docs/log/hopper.md): head size -> eights of query rows -> forms for Hopper and later.
_FORMS: dict[int, dict[int, tuple[Choice, ...]]] = {
    64: {n: (Choice(0, 4, 3, 1, 3, True), Choice(0, 2, 4, 2, 2), Choice(0, 1, 6, 4, 1)) for n in (1, 2)},
    128: {
        1: (Choice(8192, 8, 2, 1, 4, True), Choice(0, 4, 3, 2, 2), Choice(0, 2, 3, 2, 2), Choice(0, 1, 3, 4, 1)),
        2: (Choice(4096, 8, 2, 1, 4, True), Choice(0, 4, 2, 2, 2), Choice(0, 2, 3, 2, 2, True), Choice(0, 1, 3, 4, 1)),
    },
    256: {
        n: (Choice(1024, 8, 2, 1, 4, True), Choice(0, 4, 2, 2, 4), Choice(0, 2, 2, 4, 2), Choice(0, 1, 2, 4, 1))
        for n in (1, 2)
    },
}

# The same for an e4m3 cache, measured with one eight of rows. With two, heads of 64 and 256 have the same forms, and
# heads of 128 the forms above, with as many scorers as K's bytes leave room for.
_EIGHTHS: dict[int, dict[int, tuple[Choice, ...]]] = {
    64: {
        n: (
            *(Choice(0, 4, 3, 1, 4, True, 1), Choice(4096, 2, 4, 2, 4, False, 1)),
            *(Choice(0, 2, 4, 2, 2, False, 1), Choice(0, 1, 6, 4, 6, False, 1)),
        )
        for n in (1, 2)
    },
    128: {
        1: (
            *(Choice(8192, 8, 2, 1, 2, True, 1, True), Choice(0, 4, 4, 2, 2, False, 1, True)),
            *(Choice(0, 2, 4, 4, 2, False, 1, True), Choice(0, 1, 3, 4, 1, False, 1, True)),
        ),
        2: (
            *(Choice(4096, 8, 2, 1, 4, True, 1), Choice(0, 4, 2, 2, 2, False, 1)),
            *(Choice(0, 2, 3, 2, 2, True, 1), Choice(0, 1, 4, 2, 2, False, 2)),
        ),
    },
    256: {
        n: (
            *(Choice(1024, 8, 2, 1, 8, True, 1), Choice(0, 4, 2, 2, 4, False, 1)),
            *(Choice(0, 2, 2, 4, 2, False, 1), Choice(0, 1, 3, 4, 5, False, 5)),
        )
        for n in (1, 2)
    },
}


def forms(head_size: int, group: int, major: int, shared: int, eighths: bool = False) -> dict[Form, int]:
    """The forms that may serve on a device of compute capability `major` with `shared` bytes of shared memory a block,
    each with its least length (Choice). eighths: for an e4m3 cache.

    The last one needs no cluster and serves any length. There is none if shared memory does not hold it, and none for
    an e4m3 cache before Hopper.
    """
    measured = (_EIGHTHS if eighths else _FORMS)[head_size][1 if group <= 8 else 2]
    held = {Form(head_size, group, *choice[1:]): choice.least for choice in measured}
    if major >= 9 and all(form.shared_bytes <= shared for form in held):
        return held
    if eighths:
        return {}
    alone = (Form(head_size, group, 1, scorers, 4, 1) for scorers in range(_MOST_SCORERS, 1, -1))
    return dict.fromkeys([form for form in alone if form.shared_bytes <= shared][:1], 0)


def forms_on(head_size: int, group: int, device: int, eighths: bool = False) -> dict[Form, int]:
    """`forms` for device number `device`."""
    import torch

    _, shared, _ = _target(device)
    return forms(head_size, group, torch.cuda.get_device_capability(device)[0], shared, eighths)


def choose(pairs: int, longest: int, given: Mapping[Form, int], at_once: Mapping[Form, int]) -> Form:
    """The form that serves `pairs` pairs of a token and a key head.

    longest: keys of the longest request, or more. given: what `forms` returns. at_once: form of several blocks -> its
    clusters that run at once. The first form serves whose clusters all run at once, else the last.
    """
    fitting = (form for form, least in given.items() if pairs <= at_once.get(form, 0) and longest >= least)
    return next(fitting, [*given][-1])


@functools.cache
def build(form: Form, dtype: torch.dtype, arch: str, major: int) -> bytes:
    """Compile a cubin for `arch` (e.g. sm_90) with NVRTC of CUDA `major`. Raises nvrtc.CompileError."""
    source = nvrtc.source("primitives.h", "paged.h", "eighths.h", "decode.cu")
    name = _name(dtype)
    own = {"INPUT": f'"{_INPUTS[name]}"', "BRAIN": int(name == "bfloat16"), "CONTRACT": _CONTRACT}
    defines = form.defines() | own
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
    longest: int | None = None,
    form: Form | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Causal attention of q [tokens, heads, D] over paged KV, written to out [tokens, heads, D].

    k, v [pages, page size, key heads, D]: equal strides, q's type or e4m3. scales: of an e4m3 cache, K's and V's, fp32
    [key heads], whose stride may be 0; an element stands for fp32(element) * scale, rounded to q's type. starts
    [requests + 1], int32: where each request's tokens begin in q; a request may have none. lengths [requests], int32:
    tokens of each request in KV; its tokens in q are the last of these, in order. pages [requests, most pages], int32.
    scale: of the softmax. longest: the most of lengths, or more; by default what pages holds. form: one of serving's,
    by default choose's choice. Neither changes a bit. Raises Unfit before any work if the kernel does not support a
    tensor.
    """
    if problem := _unfit(q, k, v, out, starts, lengths, pages, scale, scales):
        raise Unfit(f"decode: {problem}")
    import torch

    tokens, heads, size = q.shape
    page_size, key_heads = k.shape[1:3]
    width = k.element_size()
    if not tokens or not len(lengths):
        return
    strides = (*q.stride()[:2], *(width * x for x in k.stride()[:3]), *out.stride()[:2])
    arguments = [
        *(c_void_p(x.data_ptr()) for x in (q, k, out, starts, lengths, pages)),
        c_longlong(v.data_ptr() - k.data_ptr()),
        *(c_int(x) for x in (len(lengths), pages.stride(0), page_size.bit_length() - 1, heads // key_heads)),
        c_float(c_float(scale).value * _LOG2E),
        *(c_int(stride) for stride in strides),
    ]
    if scales is not None:
        arguments += [*(c_void_p(x.data_ptr()) for x in scales), c_int(scales[0].stride(0))]
    stream = torch.cuda.current_stream(q.device).cuda_stream
    if form is None:
        most = pages.shape[1] * page_size if longest is None else longest
        known = _choices(heads // key_heads, size, q.dtype, q.device.index, scales is not None)
        form = choose(key_heads * tokens, most, *known)
    kernel(form, q.dtype, q.device.index)((form.parts * key_heads, tokens), stream, arguments)


def _unfit(q, k, v, out, starts, lengths, pages, scale, scales) -> str:
    """Why the kernel does not support these arguments; empty if it does."""
    if not covers(q.shape[1], k.shape[2], q.shape[2], q.dtype, k.dtype) or v.dtype != k.dtype or out.dtype != q.dtype:
        cache = "" if k.dtype == q.dtype else f" with KV in {k.dtype}"
        return f"heads {tuple(q.shape[1:])} over {k.shape[2]} in {q.dtype}{cache} are not covered"
    if (scales is None) != (k.dtype == q.dtype):
        return f"scales of a cache in {k.dtype}, or none"
    if scales is not None and (
        any(str(x.dtype) != "torch.float32" or x.shape != k.shape[2:3] for x in scales)
        or scales[0].stride() != scales[1].stride()
    ):
        return f"scales are not fp32 [{k.shape[2]}], laid out alike"
    # Over e4m3, the kernel may multiply the softmax's scale by 2^-78 to 2^48, and flushes what leaves the normal range.
    if scales is not None and not 2.0**-40 <= scale <= 2.0**40:
        return f"a scale of {scale} of the softmax is not covered"
    width = k.element_size()
    if not covers_pages(k.shape[1]):
        return f"pages of {k.shape[1]} tokens are not covered"
    if k.shape != v.shape or k.stride() != v.stride() or out.shape != q.shape or out.data_ptr() == q.data_ptr():
        return "k and v, or q and out, are not laid out alike, or out is q"
    if any(x.stride(-1) != 1 for x in (q, k, out)) or any(
        x.data_ptr() % 4 or x.stride(0) % 2 or x.stride(1) % 2 for x in (q, out)
    ):
        return "elements of a head do not lie side by side, aligned to 4 bytes"
    if any(x.data_ptr() % 16 or any(width * stride % 16 for stride in x.stride()[:3]) for x in (k, v)):
        return "rows of KV are not aligned to 16 bytes"
    number = lengths.shape[0]
    if starts.shape[0] != number + 1 or pages.shape[0] != number:
        return f"{tuple(starts.shape)} starts, {tuple(pages.shape)} pages do not belong to {number} requests"
    if any(str(x.dtype) != "torch.int32" or x.stride(-1) != 1 for x in (starts, lengths, pages)):
        return "starts, lengths and pages are not int32, side by side"
    # The kernel computes these in 32 bits: strides, offsets in a page, offsets of a token's heads, the grid.
    reach = (width * k.stride(0), width * k.shape[1] * k.stride(1), width * k.stride(2), pages.stride(0))
    reach += tuple(x.shape[1] * max(x.stride(0), x.stride(1)) for x in (q, out))
    if max(reach) >= 1 << 31 or q.shape[0] >= 1 << 16:
        return f"{tuple(q.shape)} queries over KV of strides {k.stride()} are too large"
    return ""


@functools.cache
def _choices(
    group: int, head_size: int, dtype: torch.dtype, device: int, eighths: bool = False
) -> tuple[dict[Form, int], dict[Form, int]]:
    """The forms that may serve, and how many clusters of each form of several blocks run at once on the device.

    A form may not serve if no cluster of its size runs, e.g. on a small slice of a GPU (MIG).
    """
    given = forms_on(head_size, group, device, eighths)
    at_once = {f: kernel(f, dtype, device).clusters(f.parts) for f in given if f.parts > 1}
    return {f: least for f, least in given.items() if at_once.get(f, 1)}, at_once


def serving(
    heads: int, key_heads: int, head_size: int, dtype: torch.dtype, device: int, eighths: bool = False
) -> list[Form]:
    """The forms that may serve these heads on device number `device`. eighths: over an e4m3 cache. Raises
    nvrtc.CompileError."""
    return [*_choices(heads // key_heads, head_size, dtype, device, eighths)[0]]


def prepare(heads: int, key_heads: int, head_size: int, dtype: torch.dtype, device: int, eighths: bool = False) -> None:
    """Compile and load every form that a model may need, so that no CUDA graph capture has to. eighths: over an e4m3
    cache.

    Raises nvrtc.CompileError.
    """
    arch, _, major = _target(device)
    needed = [*forms_on(head_size, heads // key_heads, device, eighths)]
    if not needed:
        raise nvrtc.CompileError(f"decode: heads of {head_size} do not fit into the shared memory of {arch}")
    with ThreadPoolExecutor(len(needed)) as pool:
        list(pool.map(lambda form: build(form, dtype, arch, major), needed))
    _choices(heads // key_heads, head_size, dtype, device, eighths)
    kernel(needed[-1], dtype, device)


@functools.cache
def kernel(form: Form, dtype: torch.dtype, device: int) -> nvrtc.Function:
    """The kernel, compiled and loaded on the device. Raises nvrtc.CompileError."""
    import torch

    arch, _, major = _target(device)
    cubin = build(form, dtype, arch, major)
    with torch.cuda.device(device):
        return nvrtc.Function(cubin, "decode", form.threads, form.shared_bytes)


def _target(device: int) -> tuple[str, int, int]:
    """The device's architecture, its bytes of shared memory per block, and CUDA's major version."""
    import torch

    arch, major = nvrtc.target(device)
    return arch, torch.cuda.get_device_properties(device).shared_memory_per_block_optin, major
