"""Gated delta nets and Mamba 2, in chunks of eight tokens: compiles and launches recurrent.cu, which
states shapes and order.

The bits are the same for every tile (`warps`), so the number of requests may choose it.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int, c_longlong, c_void_p
from typing import TYPE_CHECKING, NamedTuple

from . import nvrtc

if TYPE_CHECKING:
    import torch

CHUNK = 8  # tokens of a chunk
_WIDTH = 4  # tokens of the convolution
_PER = 8  # tokens of a warp in `prepare`, in a step of prompts
_PREPARE = 128  # threads of a block of `prepare` and `keep_inputs`
_SPREAD = 132 * 8  # warps that keep a device busy: with fewer, a warp gets fewer rows
_KEYS, _VALUES = (64, 128, 256), (64, 128, 256)
_ROWS = 16  # of a state, of a warp of `scan`
SEGMENT = 512  # tokens of a segment of a long prompt
_HELD = 132 * 3  # warps of `scan` that leave a device idle: with fewer, prompts are cut into segments
KERNELS = ("prepare", "keep_inputs", "scan", "scan_one", "follow")


class Unfit(ValueError):
    """The kernels do not support a call's tensors; the message says why."""


class Form(NamedTuple):
    """What recurrent.cu is compiled for.

    keys, values: elements of a head. floats: which of rate, dt_bias and D are fp32, not bf16. pieces: of bf16 in which
    a state enters products, a part of the order. What changes no bit: warps (of a block of `scan`), segment (tokens),
    part and ahead (keys of a block of `follow`, and tokens that it brings at once).
    """

    mamba: bool
    keys: int
    values: int
    key_heads: int
    heads: int
    floats: tuple[bool, bool, bool]
    pieces: int = 2
    warps: int = 4
    segment: int = SEGMENT
    part: int = 64
    ahead: int = 64

    @property
    def tile(self) -> int:
        """Tokens that a block brings at once."""
        return 2 * CHUNK

    @property
    def parts(self) -> int:
        """Blocks of a head."""
        return self.values // (_ROWS * self.warps)

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.keys + self.heads * self.values

    @property
    def kept(self) -> int:
        """Rows of a slot's `conv`: the inputs before, and the log of the open chunk's tokens."""
        row = self.heads * self.values + self.key_heads * self.keys + 2 * self.key_heads + 4 * self.heads
        log = (CHUNK - 1) * (-(-row // 8) * 8) + 8
        return _WIDTH - 1 + -(-log // self.channels)

    def defines(self, kernel: str) -> dict[str, object]:
        """The preprocessor macros of recurrent.cu."""
        rate, bias, skip = map(int, self.floats)
        return {
            "MAMBA": int(self.mamba),
            "KEYS": self.keys,
            "VALUES": self.values,
            "KEY_HEADS": self.key_heads,
            "HEADS": self.heads,
            "SCALE": f"{self.keys**-0.5!r}f",
            "TILE": self.tile,
            "PIECES": self.pieces,
            "WARPS": self.warps,
            "SEGMENT": self.segment,
            "PART": self.part,
            "AHEAD": self.ahead,
            "THREADS": self.threads(kernel),
            "RATE_FLOAT": rate,
            "BIAS_FLOAT": bias,
            "D_FLOAT": skip,
            "PARTS": 1,
            "INPUT": '"bf16"',
            "CONTRACT": 1,
            "RESIDENT": self.resident(kernel),
            "ONLY": KERNELS.index(kernel),
        }

    def resident(self, kernel: str) -> int:
        """Blocks that a multiprocessor shall hold at once, which bounds a thread's registers."""
        if kernel == "prepare":  # a lane of gated delta nets has four channels of q and of k
            warps = {64: 32, 128: 20}.get(self.values, 16) if self.mamba else 16
        elif kernel == "keep_inputs":
            warps = 32
        elif kernel == "follow":
            warps = 16
        else:
            warps = 8 if self.keys > 128 else 16 if kernel == "scan_one" else 12
        return max(1, warps * 32 // self.threads(kernel))

    def threads(self, kernel: str) -> int:
        return _PREPARE if kernel in ("prepare", "keep_inputs") else 32 * self.warps

    @property
    def units(self) -> int:
        """Warps of `prepare` for a token."""
        return (2 * self.key_heads * self.keys // 64 if self.mamba else self.key_heads) + self.heads

    def shared_bytes(self, kernel: str = "scan") -> int:
        """Of a block of `scan`, `scan_one` or `follow`."""
        keys, own = self.keys + 8, _ROWS * self.warps + 8
        if kernel == "follow":
            return 2 * self.ahead * (2 * (self.part + 8 + own) + 8) + 8 * (self.ahead // CHUNK)
        return self.tile * (2 * (4 * keys + 2 * own + 16) + 2 * own) + self.tile // CHUNK * 32 * 48


def covers(keys: int, values: int, key_heads: int, heads: int, width: int) -> str:
    """What of these sizes the kernels do not support, in words, or ""."""
    if keys not in _KEYS or values not in _VALUES or heads % key_heads:
        return f"heads of {keys} keys and {values} values, {key_heads} and {heads}; sizes of 64, 128 and 256 work"
    return "" if width == _WIDTH else f"a convolution over {width} tokens; {_WIDTH} work"


class Segments(NamedTuple):
    """The segments of a step. table int32 [n, 2], firsts int32 [requests]: see recurrent.cu. prompts: requests that may
    have many tokens."""

    table: torch.Tensor
    firsts: torch.Tensor
    prompts: int


def cut(starts: torch.Tensor, tokens: int, prompts: int, segment: int = SEGMENT) -> Segments | None:
    """The segments of requests, None if they are short. starts: int32 [requests + 1], the first token of each."""
    import torch

    if tokens < 2 * segment * prompts:
        return None
    requests, spare = len(starts) - 1, segment + CHUNK - 2  # the chunk that was open has at most CHUNK - 1 tokens more
    counts = (starts.diff() + spare) // segment
    ends = counts.cumsum(0, dtype=torch.int32)
    at = torch.arange((tokens + spare * requests) // segment, dtype=torch.int32, device=starts.device)
    # Behind the last one, segments without tokens.
    request = torch.searchsorted(ends, at, right=True, out_int32=True).clamp(max=requests - 1)
    firsts = ends - counts
    return Segments(torch.stack([request, at - firsts[request]], 1).to(torch.int32), firsts, prompts)


def tiles(form: Form) -> tuple[Form, Form]:
    """The form for few requests, and the form for many: more warps of a block share what it loads of keys."""
    return form._replace(warps=2), form._replace(warps=4)


def choose(form: Form, requests: int) -> Form:
    """The form for a step of `requests` requests. It changes no bit."""
    few, many = tiles(form)
    return many if requests * many.parts * many.warps * form.heads >= _SPREAD else few


def choose_one(form: Form, requests: int) -> Form:
    """The form for a step of one token a request. It changes no bit."""
    return choose(form, requests)


@functools.cache
def build(form: Form, kernel: str, arch: str, major: int) -> bytes:
    """Compile a cubin for `arch` (e.g. sm_90) with NVRTC of CUDA `major`. Raises nvrtc.CompileError."""
    return nvrtc.compile(nvrtc.source("primitives.h", "recurrent.cu"), arch, form.defines(kernel), major)


@functools.cache
def load(form: Form, kernel: str, device: int) -> nvrtc.Function:
    """A kernel, compiled and loaded on the device. Raises nvrtc.CompileError."""
    import torch

    cubin = build(form, kernel, *nvrtc.target(device))
    with torch.cuda.device(device):
        shared = 0 if kernel in ("prepare", "keep_inputs") else form.shared_bytes(kernel)
        return nvrtc.Function(cubin, kernel, form.threads(kernel), shared)


def prepare(form: Form, device: int) -> None:
    """Compile and load every kernel that a model may need, so that no CUDA graph capture has to.

    Raises nvrtc.CompileError.
    """
    few, many = tiles(form)
    scans = ((tile, kernel) for tile in (few, many) for kernel in ("scan", "scan_one"))
    needed = [(few, "prepare"), (few, "keep_inputs"), *scans, *[(many, "follow")] * form.mamba]
    with ThreadPoolExecutor(len(needed)) as pool:
        list(pool.map(lambda job: build(*job, *nvrtc.target(device)), needed))
    for job in needed:
        load(*job, device)


def run(
    form: Form,
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor | None,
    rate: torch.Tensor,
    dt_bias: torch.Tensor,
    skip: torch.Tensor | None,
    conv: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor | None,
    fresh: torch.Tensor | None,
    which: torch.Tensor | None,
    segments: Segments | None = None,
) -> None:
    """The convolution and the recurrence over x [tokens, channels] (bf16), into out [tokens, heads, values], dense.

    a, b [tokens, heads]: bf16, before softplus and sigmoid; Mamba 2 has dt as a, and no b. rate, dt_bias, skip [heads]:
    A_log (Mamba 2: A), the bias of a, D. conv [slots, form.kept, channels] bf16 and states fp32 [slots, heads, values,
    keys] are updated in place. slots int32 [requests]. starts int32 [requests + 1], fresh int8 [requests], which int32
    [tokens]: see recurrent.cu; all None in a step of one token a request. segments: of `cut`, which change no bit.
    Raises Unfit before any work.
    """
    if problem := _unfit(form, out, x, weight, bias, a, b, conv, states, slots):
        raise Unfit(f"recurrent: {problem}")
    import torch

    tokens, requests, device = len(x), len(slots), x.device.index
    if not tokens or not requests:
        return
    stream = torch.cuda.current_stream(x.device).cuda_stream
    keyed = torch.empty(tokens, form.key_heads, 2, dtype=torch.float32, device=x.device)
    valued = torch.empty(tokens, form.heads, 2, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens, form.channels, dtype=x.dtype, device=x.device)
    counts = torch.empty(requests, dtype=torch.int32, device=x.device)
    per = 1 if starts is None else _PER
    at = lambda *held: [c_void_p(None if t is None else t.data_ptr()) for t in held]  # noqa: E731
    ints = lambda *held: [c_int(n) for n in held]  # noqa: E731
    few, _ = tiles(form)
    load(few, "prepare", device)(
        (-(-tokens // per), -(-form.units // (_PREPARE // 32))),
        stream,
        [
            *at(x, weight, bias, conv, a, b, rate, dt_bias, y, keyed, valued, starts, slots, fresh, which),
            c_longlong(conv.stride(0)),
            *ints(tokens, requests, per, x.stride(0), conv.stride(1), a.stride(0), 0 if b is None else b.stride(0)),
            *at(counts),
        ],
    )
    given = at(y, keyed, valued, skip, states, out)
    last = [c_longlong(states.stride(0)), *at(conv), c_longlong(conv.stride(0)), *at(counts)]
    if starts is None:
        tile = choose_one(form, requests)
        load(tile, "scan_one", device)((form.heads * tile.parts, requests), stream, [*given, *at(slots), *last])
        return
    more, blocks, starting = at(starts, slots, fresh), requests, None
    if segments is not None and form.mamba and segments.prompts * form.heads * form.values // _ROWS <= _HELD:
        _, tile = tiles(form)
        blocks = len(segments.table)
        starting = torch.empty(blocks, *states.shape[1:], dtype=torch.float32, device=x.device)
        load(tile, "follow", device)(
            (form.heads * tile.parts * (form.keys // form.part), requests),
            stream,
            [*at(y, valued, states), *more, *last, *at(segments.firsts, starting)],
        )
    tile, table = choose(form, blocks), None if starting is None else segments.table
    load(tile, "scan", device)((form.heads * tile.parts, blocks), stream, [*given, *more, *last, *at(table, starting)])
    load(few, "keep_inputs", device)(
        (requests, -(-form.channels // (2 * _PREPARE))),
        stream,
        [
            *at(x, conv, y, keyed, valued, starts, slots, fresh),
            c_longlong(conv.stride(0)),
            *ints(x.stride(0), conv.stride(1)),
            *at(counts),
        ],
    )


def _unfit(
    form: Form,
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor | None,
    conv: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
) -> str:
    """Why the kernels do not support these arguments of `run`; empty if they do."""
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
    if conv.stride(1) != form.channels or conv.data_ptr() % 16 or conv.stride(0) % 8:
        return "inputs of a slot are not dense and aligned to 16 bytes"
    if states.data_ptr() % 16 or states.stride(0) % 4 or out.data_ptr() % 16:
        return "states or out are not aligned to 16 bytes"
    if slots.dtype != torch.int32 or not slots.is_contiguous() or len(slots) > nvrtc.MOST_BLOCKS:
        return "slots are not int32, side by side, or too many"
    return ""
