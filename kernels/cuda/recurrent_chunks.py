"""Gated delta nets and Mamba 2, in chunks of eight tokens: compiles and launches recurrent_chunks.cu, which
states shapes and order.

The bits are the same for every tile (`warps`), so the number of requests may choose it.
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

CHUNK = 8  # tokens of a chunk
_ROWS = 16  # of a state, of a warp of `scan`
KERNELS = ("prepare", "keep_inputs", "scan", "scan_one")


class Form(NamedTuple):
    """What recurrent_chunks.cu is compiled for.

    keys, values: elements of a head. floats: which of rate, dt_bias and D are fp32, not bf16. pieces: of bf16 in which
    a state enters products, a part of the order. warps: of a block of `scan`, which changes no bit.
    """

    mamba: bool
    keys: int
    values: int
    key_heads: int
    heads: int
    floats: tuple[bool, bool, bool]
    pieces: int = 2
    warps: int = 4

    @property
    def tile(self) -> int:
        """Tokens that a block brings at once."""
        return min(16, 2048 // self.keys)

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
        return WIDTH - 1 + -(-log // self.channels)

    def defines(self, kernel: str) -> dict[str, object]:
        """The preprocessor macros of recurrent_chunks.cu."""
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
        warps = {"scan": 12, "scan_one": 16, "prepare": 16}.get(kernel, 32)
        return max(1, (warps if self.keys <= 128 else 8) * 32 // self.threads(kernel))

    def threads(self, kernel: str) -> int:
        return 32 * self.warps if kernel.startswith("scan") else PREPARE

    def shared_bytes(self) -> int:
        """Of a block of `scan`."""
        return 2 * self.tile * (4 * (self.keys + 8) + 4 * (_ROWS * self.warps + 8) + 16)


def tiles(form: Form) -> tuple[Form, Form]:
    """The form for few requests, and the form for many: more warps of a block share what it loads of keys."""
    return form._replace(warps=2), form._replace(warps=4)


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
    source = (folder / "primitives.h").read_text() + (folder / "recurrent_chunks.cu").read_text()
    return nvrtc.compile(source, arch, form.defines(kernel), major)


@functools.cache
def load(form: Form, kernel: str, device: int) -> nvrtc.Function:
    """A kernel, compiled and loaded on the device. Raises nvrtc.CompileError."""
    import torch

    cubin = build(form, kernel, *target(device))
    with torch.cuda.device(device):
        shared = form.shared_bytes() if kernel.startswith("scan") else 0
        return nvrtc.Function(cubin, kernel, form.threads(kernel), shared)


def prepare(form: Form, device: int) -> None:
    """Compile and load every kernel that a model may need, so that no CUDA graph capture has to.

    Raises nvrtc.CompileError.
    """
    few, many = tiles(form)
    needed = [*((few, kernel) for kernel in KERNELS), *((many, kernel) for kernel in KERNELS if "scan" in kernel)]
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
    [tokens]: see recurrent_chunks.cu; all None in a step of one token a request. Raises Unfit before any work.
    """
    if problem := unfit(form, out, x, weight, bias, a, b, conv, states, slots, logged=True):
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
    per = 1 if starts is None else PER
    at = lambda *held: [c_void_p(None if t is None else t.data_ptr()) for t in held]  # noqa: E731
    ints = lambda *held: [c_int(n) for n in held]  # noqa: E731
    few, _ = tiles(form)
    load(few, "prepare", device)(
        (-(-tokens // per), -(-(form.key_heads + form.heads) // (PREPARE // 32))),
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
        tile, kernel, more = choose_one(form, requests), "scan_one", at(slots)
    else:
        tile, kernel, more = choose(form, requests), "scan", at(starts, slots, fresh)
    load(tile, kernel, device)((form.heads * tile.parts, requests), stream, [*given, *more, *last])
    if starts is not None:
        load(few, "keep_inputs", device)(
            (requests, -(-form.channels // (2 * PREPARE))),
            stream,
            [
                *at(x, conv, y, keyed, valued, starts, slots, fresh),
                c_longlong(conv.stride(0)),
                *ints(x.stride(0), conv.stride(1)),
                *at(counts),
            ],
        )
