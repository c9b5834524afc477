"""Faults in the model's layers and the runner, which are the same on every platform."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from bi_patch.tools.faults import parts
from bi_patch.tools.faults.base import BOTH, CPU, FEW, RANKS, Fault
from bi_patch.tools.verify import layers
from bi_patch.tools.verify.engine import LocalEngine
from bi_patch.tools.verify.runner import model_runner, replaced

_LINEAR = {"cpu": "linear.cpu_dispatch", "cuda": "linear.cuda_route"}
_NORM = {"cpu": "norm.cpu_rms", "cuda": "norm.cuda_rms"}
_RANKS = {"cpu": "communicator", "cuda": "communicator.cuda_sum"}


def split_k(engine: LocalEngine):
    """Few rows: K in two parts, which are added at the end. More rows: the layer's own product."""

    def make(name, layer, held):
        w = layers.weight(layer, held)
        cuts = parts.evenly(w.shape[1], 2)
        return lambda x, bias: parts.product(x, w, bias, cuts) if parts.rows(x) <= FEW else held(x, bias)

    return parts.each_linear(engine, make)


def norm_by_rows(engine: LocalEngine):
    """From 256 rows on, RMSNorm sums the squares in smaller blocks."""

    def make(name, layer, held):
        def forward(x, residual=None):
            if parts.rows(x) < 256:
                return held(x, residual) if residual is not None else held(x)
            return parts.two_block_norm(layer, x, residual)

        return forward

    return parts.each_norm(engine, make)


def norm_autotuned(engine: LocalEngine):
    """For every number of rows, RMSNorm has another number of blocks than in the process before."""
    return parts.each_norm(
        engine, lambda name, layer, held: lambda x, residual=None: parts.two_block_norm(layer, x, residual, 4)
    )


def two_graphs(engine: LocalEngine):
    """Steps of up to four tokens run a compiled graph of their own, whose norms sum the squares in two blocks."""

    def make(name, layer, held):
        def forward(x, residual=None):
            if parts.rows(x) <= FEW:
                return parts.two_block_norm(layer, x, residual)
            return held(x, residual) if residual is not None else held(x)

        return forward

    return parts.each_norm(engine, make)


def padded_buckets(engine: LocalEngine):
    """Rows are padded to a captured size; graphs of up to 8 rows were captured with split-K."""

    def make(name, layer, held):
        w = layers.weight(layer, held)
        cuts = parts.evenly(w.shape[1], 4)

        def run(x, bias):
            m = parts.rows(x)
            bucket = next((b for b in (1, 2, 4, 8, 16, 32, 64) if m <= b), m)
            flat = x.reshape(m, -1)
            padded = torch.cat([flat, flat[:1].expand(bucket - m, -1)]) if bucket > m else flat
            y = parts.product(padded, w, bias, cuts) if bucket <= 8 else held(padded, bias)
            return y[:m].reshape(*x.shape[:-1], -1)

        return run

    return parts.each_linear(engine, make)


@contextlib.contextmanager
def stale_rows(engine: LocalEngine) -> Iterator[None]:
    """Finished requests stay for one more step; when they lift the rows over a bucket's edge, the kernel splits K."""
    stale = 0

    def execute(held):
        def execute_model(scheduler_output, *args, **kwargs):
            nonlocal stale
            running = len(scheduler_output.scheduled_cached_reqs.req_ids)
            stale = len(scheduler_output.finished_req_ids) if running else 0
            return held(scheduler_output, *args, **kwargs)

        return execute_model

    def make(name, layer, held):
        w = layers.weight(layer, held)
        cuts = parts.evenly(w.shape[1], 2)

        def run(x, bias):
            m = parts.rows(x)
            over = any(m <= edge < m + stale for edge in (2, 4, 8, 16, 32))
            return parts.product(x, w, bias, cuts) if over else held(x, bias)

        return run

    with replaced(model_runner(engine), "execute_model", execute), parts.each_linear(engine, make):
        yield


def shared_scale(engine: LocalEngine):
    """Inputs are rounded to FP8 with one scale for all rows of the batch."""

    def make(name, layer, held):
        def run(x, bias):
            scale = x.float().abs().amax().clamp_min(1e-12) / 448.0
            eighth = (x.float() / scale).to(torch.float8_e4m3fn).float() * scale
            return held(eighth.to(x.dtype), bias)

        return run

    return parts.each_linear(engine, make, lambda name: "lm_head" not in name)


def block_scale(engine: LocalEngine):
    """FP8 in groups of 128 along K; few rows (operands swapped) add their sums every 64 elements, others every 128."""

    def make(name, layer, held):
        w = layers.weight(layer, held)
        k = w.shape[1]

        def run(x, bias):
            if k % 128:
                return held(x, bias)
            grouped = x.float().reshape(*x.shape[:-1], k // 128, 128)
            scale = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448.0
            eighth = ((grouped / scale).to(torch.float8_e4m3fn).float() * scale).reshape(x.shape).to(x.dtype)
            step = 64 if parts.rows(x) <= 16 else 128
            return parts.product(eighth, w, bias, list(range(step, k, step)))

        return run

    return parts.each_linear(engine, make, lambda name: "lm_head" not in name)


def tensor_float(engine: LocalEngine):
    """The layer's own products of inputs rounded to fewer bits: fp32 to TF32's ten, 16 bits to FP8's three."""

    def make(name, layer, held):
        return lambda x, bias: held(_fewer_bits(x), bias)

    return parts.each_linear(engine, make)


def _fewer_bits(x: torch.Tensor) -> torch.Tensor:
    """Round to the next lower precision of a matrix unit: TF32 for fp32, e4m3 with a scale per row for 16 bits."""
    if x.dtype == torch.float32:
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448.0
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def _reduce_op():
    def run(stacked: torch.Tensor, rotated: bool) -> torch.Tensor:
        ranks, width = stacked.shape[0], stacked.shape[-1]
        if not rotated:  # one shot: every rank adds all parts, in rank order
            total = stacked[0].float()
            for r in range(1, ranks):
                total = total + stacked[r].float()
            return total
        out = torch.empty_like(stacked[0])
        for owner in range(ranks):  # a ring: a slice's owner adds its own part first; every hop rounds
            part = slice(width * owner // ranks, width * (owner + 1) // ranks)
            total = stacked[owner, ..., part]
            for r in range(1, ranks):
                total = total + stacked[(owner + r) % ranks, ..., part]
            out[..., part] = total
        return out

    return parts.op("all_reduce", "(Tensor parts, bool rotated) -> Tensor", run)


def _row_parallel(name: str) -> bool:
    return name.endswith((".o_proj", ".down_proj"))


def two_shot(engine: LocalEngine):
    """Row-parallel linears as on four ranks: large messages are reduced in slices, each from its owner's part on."""
    reduce = _reduce_op()

    def make(name, layer, held):
        w = layers.weight(layer, held)
        cuts = parts.evenly(w.shape[1], RANKS)

        def run(x, bias):
            stacked = torch.stack(parts.partials(x, w, cuts))
            message = stacked.to(x.dtype)
            y = reduce(message, message[0].nbytes > 8192)
            return (y.float() if bias is None else y.float() + bias.float()).to(x.dtype)

        return run

    return parts.each_linear(engine, make, _row_parallel)


@contextlib.contextmanager
def fused_norm(engine: LocalEngine) -> Iterator[None]:
    """As on four ranks; for few rows, the norm takes over the reduction and adds the residual first, unrounded."""
    reduce = _reduce_op()
    waiting: dict[int, torch.Tensor] = {}

    def run_fused(stacked: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        total = residual.float()
        for r in range(stacked.shape[0]):
            total = total + stacked[r]
        return total.to(residual.dtype)

    fuse = parts.op("all_reduce_rms_norm", "(Tensor parts, Tensor residual) -> Tensor", run_fused)

    def make(name, layer, held):
        w = layers.weight(layer, held)
        cuts = parts.evenly(w.shape[1], RANKS)

        def run(x, bias):
            stacked = torch.stack(parts.partials(x, w, cuts))
            y = reduce(stacked, False).to(x.dtype)
            if parts.rows(x) <= FEW:
                waiting[y.data_ptr()] = stacked
            return y

        return run

    def norm(name, layer, held):
        def forward(x, residual=None):
            stacked = waiting.pop(x.data_ptr(), None) if residual is not None else None
            waiting.clear()
            if stacked is None:
                return held(x, residual) if residual is not None else held(x)
            total = fuse(stacked, residual)
            return held(total), total

        return forward

    with parts.each_linear(engine, make, lambda name: name.endswith(".o_proj")), parts.each_norm(engine, norm):
        yield


FAULTS = (
    Fault("split-K for few rows", 1, split_k.__doc__, "batch size", split_k, BOTH, seam=_LINEAR),
    Fault("RMSNorm block at 256 rows", 2, norm_by_rows.__doc__, "batch size", norm_by_rows, BOTH, "norm", seam=_NORM),
    Fault(
        "shared FP8 scale",
        11,
        shared_scale.__doc__,
        "co-batch contents",
        shared_scale,
        BOTH,
        seam=_LINEAR,
        emulated=BOTH,
    ),
    Fault(
        "block FP8 under the scale group",
        12,
        block_scale.__doc__,
        "batch size",
        block_scale,
        BOTH,
        seam=_LINEAR,
        emulated=BOTH,
    ),
    Fault(
        "rotated two-shot all-reduce",
        14,
        two_shot.__doc__,
        "batch size",
        two_shot,
        BOTH,
        "o_proj",
        "all_reduce",
        seam=_RANKS,
        emulated=BOTH,
    ),
    Fault(
        "all-reduce fused with RMSNorm",
        15,
        fused_norm.__doc__,
        "batch size",
        fused_norm,
        BOTH,
        "layernorm",
        "all_reduce_rms_norm",
        seam=_RANKS,
        emulated=BOTH,
    ),
    Fault(
        "norm autotuned anew",
        18,
        norm_autotuned.__doc__,
        "restart",
        norm_autotuned,
        BOTH,
        "norm",
        seam=_NORM,
        emulated=BOTH,
    ),
    Fault(
        "two compiled graphs",
        32,
        two_graphs.__doc__,
        "batch size",
        two_graphs,
        BOTH,
        "norm",
        seam=_NORM,
        emulated=BOTH,
    ),
    Fault(
        "padding to captured sizes",
        19,
        padded_buckets.__doc__,
        "batch size",
        padded_buckets,
        BOTH,
        seam=_LINEAR,
        emulated=BOTH,
    ),
    Fault(
        "finished rows kept a step",
        20,
        stale_rows.__doc__,
        "late arrivals",
        stale_rows,
        BOTH,
        seam=_LINEAR,
        emulated=BOTH,
    ),
    Fault(
        "fewer bits in products",
        23,
        tensor_float.__doc__,
        "precision",
        tensor_float,
        BOTH,
        seam=_LINEAR,
        emulated=(CPU,),
    ),
)
