"""Gated delta nets and Mamba 2, one token after the other: compiles and launches recurrent.cu, which states shapes and
order.

The bits are the same for every tile (`rows`, `warps`), so the number of requests may choose it.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int, c_longlong, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import nvrtc
from .recurrent_layers import PER, PREPARE, SPREAD, WIDTH, Unfit, target, unfit

if TYPE_CHECKING:
    import torch

_SCANS = ("scan", "scan_one")


class Form(NamedTuple):
    """What recurrent.cu is compiled for.

    keys, values: elements of a head. floats: which of rate, dt_bias and D are fp32, not bf16. lanes: that share a sum
    over keys, a part of the order. every: a decode writes the state of each so many-th token, which changes no bit but
    the slots' layout. rows: of a lane. warps: of a block of `scan`. The others: ways of a tile (see recurrent.cu).
    """

    mamba: bool
    keys: int
    values: int
    key_heads: int
    heads: int
    floats: tuple[bool, bool, bool]
    rows: int = 2
    warps: int = 4
    lanes: int = 8
    ahead: bool = True
    unroll: int = 2
    spread: bool = False
    raw: bool = False
    scatter: bool = False
    stream: bool = False
    every: int = 8
    fetch: int = 3

    @property
    def tile(self) -> int:
        """Tokens that a block brings at once."""
        return min(16, 2048 // self.keys, 512 * self.warps // self.keys)

    @property
    def parts(self) -> int:
        """Blocks of a head."""
        return self.values * self.lanes // (32 * self.rows * self.warps)

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.keys + self.heads * self.values

    @property
    def kept(self) -> int:
        """Rows of a slot's `conv`: the inputs before, and what is kept of the tokens since its state was written."""
        row = 2 * self.heads * self.values + self.key_heads * self.keys + 2 * self.heads
        log = (self.every - 1) * (-(-row // 8) * 8) + 8 if self.every > 1 else 0
        return WIDTH - 1 + -(-log // self.channels)

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
            "SHARERS": self.lanes,
            "ROWS": self.rows,
            "WARPS": self.warps,
            "AHEAD": int(self.ahead),
            "UNROLL": self.unroll,
            "SPREAD": int(self.spread),
            "RAW": int(self.raw),
            "SCATTER": int(self.scatter),
            "STREAM": int(self.stream),
            "EVERY": self.every,
            "FETCH": self.fetch,
            "THREADS": self.threads(kernel),
            "RATE_FLOAT": rate,
            "BIAS_FLOAT": bias,
            "D_FLOAT": skip,
            "PARTS": 1,
            "INPUT": '"bf16"',
            "CONTRACT": 1,
        }

    def threads(self, kernel: str) -> int:
        return 32 * self.warps if kernel.startswith("scan") else PREPARE

    def shared_bytes(self) -> int:
        """Of a block of `scan`."""
        own = self.values // self.parts
        return 2 * self.tile * ((2 if self.raw else 4) * (2 * self.keys + own) + 4 * 8 + 2 * own)


def tiles(form: Form) -> tuple[Form, Form]:
    """The form for few requests, and the form for many: more rows of a lane share what a warp loads of keys."""
    return form._replace(rows=2, warps=4), form._replace(rows=2 if form.keys > 128 else 4, warps=4)


def choose(form: Form, requests: int) -> Form:
    """The form for a step of `requests` requests. It changes no bit."""
    few, many = tiles(form)
    return many if requests * many.parts * many.warps * form.heads >= SPREAD else few


def choose_one(form: Form, requests: int) -> Form:
    """The form for a step of one token a request. It changes no bit."""
    return choose(form, requests)


@functools.cache
def build(form: Form, kernel: str, arch: str, major: int) -> bytes:
    """Compile a cubin for `arch` (e.g. sm_90) with NVRTC of CUDA `major`. Raises nvrtc.CompileError."""
    folder = Path(__file__).resolve().parent
    source = (folder / "primitives.h").read_text() + (folder / "recurrent.cu").read_text()
    return nvrtc.compile(source, arch, form.defines(kernel), major)


@functools.cache
def load(form: Form, kernel: str, device: int) -> nvrtc.Function:
    """A kernel, compiled and loaded on the device. Raises nvrtc.CompileError."""
    import torch

    cubin = build(form, kernel, *target(device))
    with torch.cuda.device(device):
        shared = form.shared_bytes() if kernel == "scan" else 0
        return nvrtc.Function(cubin, kernel, form.threads(kernel), shared)


def prepare(form: Form, device: int) -> None:
    """Compile and load every kernel that a model may need, so that no CUDA graph capture has to.

    Raises nvrtc.CompileError.
    """
    few, many = tiles(form)
    needed = [(form, "prepare"), (form, "keep_inputs"), *((tile, scan) for tile in (few, many) for scan in _SCANS)]
    with ThreadPoolExecutor(len(needed)) as pool:
        list(pool.map(lambda job: build(*job, *target(device)), needed))
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
) -> None:
    """The convolution and the recurrence over x [tokens, channels] (bf16), into out [tokens, heads, values], dense.

    a, b [tokens, heads]: bf16, before softplus and sigmoid; Mamba 2 has dt as a, and no b. rate, dt_bias, skip [heads]:
    A_log (Mamba 2: A), the bias of a, D. conv [slots, form.kept, channels] bf16 and states fp32 [slots, heads, values,
    keys] are updated in place. slots int32 [requests]. starts int32 [requests + 1], fresh int8 [requests], which int32
    [tokens]: see recurrent.cu; all None in a step of one token a request. Raises Unfit before any work.
    """
    if problem := unfit(form, out, x, weight, bias, a, b, conv, states, slots, logged=form.every > 1):
        raise Unfit(f"recurrent: {problem}")
    import torch

    tokens, requests, device = len(x), len(slots), x.device.index
    if not tokens or not requests:
        return
    stream = torch.cuda.current_stream(x.device).cuda_stream
    keyed = torch.empty(tokens, form.key_heads, 4, dtype=torch.float32, device=x.device)
    valued = torch.empty(tokens, form.heads, 2, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens, form.channels, dtype=x.dtype, device=x.device)
    per = 1 if starts is None else PER
    counts = torch.empty(requests, dtype=torch.int32, device=x.device) if form.every > 1 else None
    at = lambda *held: [c_void_p(None if t is None else t.data_ptr()) for t in held]  # noqa: E731
    ints = lambda *held: [c_int(n) for n in held]  # noqa: E731
    load(form, "prepare", device)(
        (-(-tokens // per), -(-(form.key_heads + form.heads) // (PREPARE // 32))),
        stream,
        [
            *at(x, weight, bias, conv, a, b, rate, dt_bias, y, keyed, valued, starts, slots, fresh, which),
            c_longlong(conv.stride(0)),
            *ints(tokens, requests, per, x.stride(0), conv.stride(1), a.stride(0), 0 if b is None else b.stride(0)),
            *at(counts),
        ],
    )
    if starts is not None:
        load(form, "keep_inputs", device)(
            (requests, -(-form.channels // (2 * PREPARE))),
            stream,
            [
                *at(x, conv, starts, slots, fresh),
                c_longlong(conv.stride(0)),
                *ints(x.stride(0), conv.stride(1)),
                *at(counts),
            ],
        )
    given = at(y, keyed, valued, skip, states, out)
    last = [c_longlong(states.stride(0)), *at(conv), c_longlong(conv.stride(0)), *at(counts)]
    if starts is None:
        form, kernel, more = choose_one(form, requests), "scan_one", at(slots)
    else:
        form, kernel, more = choose(form, requests), "scan", at(starts, slots, fresh)
    load(form, kernel, device)((form.heads * form.parts, requests), stream, [*given, *more, *last])
