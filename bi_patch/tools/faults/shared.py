"""Faults in the model's layers, sampler and runner, which are the same on every platform."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator

import torch

from bi_patch.tools.faults import parts
from bi_patch.tools.faults.base import BOTH, CPU, CUDA, Fault, platform
from bi_patch.tools.verify import layers
from bi_patch.tools.verify.engine import LocalEngine
from bi_patch.tools.verify.runner import model_runner, replaced

_LINEAR = {"cpu": "linear.cpu_dispatch", "cuda": "linear.cuda_route"}
_NORM = {"cpu": "norm.cpu_rms", "cuda": "norm.cuda_rms"}
EXPERTS = {"cpu": "moe.cpu_experts", "cuda": "moe.cuda_tables"}
_DRAW = {"cpu": "sampling.cpu_draw", "cuda": "sampling.cuda_top_k_top_p"}
_TOP = {"cpu": "sampling.cpu_gather_logprobs", "cuda": "sampling.cuda_gather_logprobs"}
_RANKS = {"cpu": "communicator", "cuda": "communicator.cuda_sum"}
FEW = 4  # up to this number of rows, a library takes its kernel for few rows
RANKS = 4  # a sum of two is the same in any order


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


def one_generator(engine: LocalEngine):
    """All rows of a batch draw from the first row's generator."""
    sampler = model_runner(engine).sampler.topk_topp_sampler

    def wrap(held):
        def forward(logits, generators, k, p):
            first = generators[min(generators)] if generators else None
            return held(logits, {i: first for i in generators}, k, p)

        return forward

    return replaced(sampler, "forward", wrap)


def seeds_on_arrival(engine: LocalEngine):
    """The runner draws the seed of each sampled request when the request arrives there, from one stream for all."""
    stream = random.Random(0)

    def execute(held):
        def execute_model(scheduler_output, *args, **kwargs):
            for new in scheduler_output.scheduled_new_reqs:
                if new.sampling_params is not None and new.sampling_params.seed is not None:
                    new.sampling_params = copy.copy(new.sampling_params)
                    new.sampling_params.seed = stream.randrange(2**52)
            return held(scheduler_output, *args, **kwargs)

        return execute_model

    return replaced(model_runner(engine), "execute_model", execute)


def masked_by_company(engine: LocalEngine):
    """As soon as one request of a step has top-p, vLLM's PyTorch code sorts and masks every row."""
    from vllm.v1.sample.ops import topk_topp_sampler

    def every_row(logits, k, p, *args, **kwargs):
        return topk_topp_sampler.apply_top_k_top_p_pytorch(logits, k, p)

    if platform() == CPU:
        from bi_patch.ops.cpu import top_k_top_p

        return replaced(top_k_top_p, "mask", lambda held: every_row)
    from vllm.v1.sample.ops import topk_topp_triton

    return replaced(topk_topp_triton, "apply_top_k_top_p_triton", lambda held: every_row)


def calls_counted(engine: LocalEngine):
    """A custom logits processor counts its calls, also those for parts of a prompt, whose token is dropped."""
    from bi_patch.tools.verify import rows

    def counted(followed, position):
        followed.calls += 1
        return followed.value + followed.calls - 1

    return replaced(rows, "counted", lambda held: counted)


def ties_by_rows(engine: LocalEngine):
    """The top-k of the top logprobs depends on the number of rows: in more than a few, the higher token wins a tie."""
    from bi_patch.ops.topk import topk
    from bi_patch.seams.overlay import Overlay, with_globals

    def by_rows(scores, k, dim=-1):
        return topk(scores, k, dim) if scores.shape[0] <= FEW else parts.higher_first(scores, k)

    seam = _TOP[platform()]
    function = with_globals(parts.original(seam).__func__, torch=Overlay(torch, topk=by_rows))
    return replaced(model_runner(engine).sampler, "gather_logprobs", lambda _: function)


def first_library(engine: LocalEngine):
    """The first structured-output request of a running batch picks the grammar library of all requests."""
    scheduler = engine.core.scheduler
    backends = scheduler.structured_output_manager.backend

    def wrap(held):
        def of(name):
            running = [r for r in list(scheduler.requests.values()) if r.structured_output_request is not None]
            return held(running[0].sampling_params.structured_outputs._backend if running else name)

        return of

    return replaced(backends, "of", wrap)


@contextlib.contextmanager
def stale_buffer(engine: LocalEngine) -> Iterator[None]:
    """The prompt logprobs of all requests share one buffer, which the next request overwrites."""
    from vllm.v1.outputs import LogprobsTensors

    held = LogprobsTensors.empty_cpu
    buffers: dict[int, object] = {}

    def empty_cpu(positions, tokens, *args, **kwargs):
        whole = buffers.setdefault(tokens, held(4096, tokens, *args, **kwargs))
        return LogprobsTensors(*(t[:positions] if torch.is_tensor(t) else t for t in whole))

    LogprobsTensors.empty_cpu = staticmethod(empty_cpu)
    try:
        yield
    finally:
        LogprobsTensors.empty_cpu = staticmethod(held)


def aborted_prefix(engine: LocalEngine):
    """Every block of an aborted prompt counts as computed, also a block that the prompt's chunks filled in part."""
    scheduler = engine.core.scheduler

    def wrap(held):
        def finish_requests(request_ids, status):
            for name in [request_ids] if isinstance(request_ids, str) else list(request_ids or ()):
                request = scheduler.requests.get(name)
                if request is not None and not request.is_finished():
                    manager = scheduler.kv_cache_manager
                    slots = len(manager.get_block_ids(name)[0]) * engine.info.block_size
                    manager.cache_blocks(request, min(request.num_prompt_tokens, slots))
            return held(request_ids, status)

        return finish_requests

    return replaced(scheduler, "finish_requests", wrap)


@contextlib.contextmanager
def each_moe(engine: LocalEngine, make) -> Iterator[None]:
    """Within this context, every layer's experts run make(kernel object, own).

    own: the layer's experts, (x, weights, ids) -> [rows, hidden].
    """
    with contextlib.ExitStack() as stack:
        for _, experts in list(layers.experts(engine)):

            def wrap(held, experts=experts):
                def apply(output, hidden_states, w1, w2, topk_weights, topk_ids, *args, **kwargs):
                    def own(x, weights, ids):
                        out = torch.empty_like(x)
                        held(out, x, w1, w2, weights, ids, *args, **kwargs)
                        return out

                    output.copy_(make(experts, own)(hidden_states, topk_weights, topk_ids))

                return apply

            stack.enter_context(replaced(experts, "apply", wrap))
        yield


def one_expert_at_a_time(own, x, weights, ids, order):
    """Add each expert's product in the rows' dtype, like atomics in memory; fp32 sums would round the order away."""
    total = None
    for j in order:
        part = own(x, weights[:, j : j + 1].contiguous(), ids[:, j : j + 1].contiguous())
        total = part if total is None else total + part
    return total


def experts_by_rows(engine: LocalEngine):
    """For few rows, atomics add the experts' products in any order, here from the last expert to the first."""

    def make(layer, own):
        def run(x, weights, ids):
            if x.shape[0] > 16:
                return own(x, weights, ids)
            return one_expert_at_a_time(own, x, weights, ids, reversed(range(ids.shape[1])))

        return run

    return each_moe(engine, make)


def experts_of_one_row(engine: LocalEngine):
    """A prompt that is cached except for its last token gives the experts one row, which they add in another order."""

    def make(layer, own):
        def run(x, weights, ids):
            if x.shape[0] > 1:
                return own(x, weights, ids)
            return one_expert_at_a_time(own, x, weights, ids, range(ids.shape[1]))

        return run

    return each_moe(engine, make)


def combine_by_rank(engine: LocalEngine):
    """Experts on four data-parallel ranks: the addition of a row's parts starts at the row's own rank."""

    def run(stacked: torch.Tensor) -> torch.Tensor:
        ranks, m = stacked.shape[:2]
        out = torch.empty_like(stacked[0])
        for row in range(m):
            first = row * ranks // m
            total = stacked[first, row]
            for r in range(1, ranks):
                total = total + stacked[(first + r) % ranks, row]
            out[row] = total
        return out

    combine = parts.op("combine", "(Tensor parts) -> Tensor", run)

    def make(experts, own):
        def apply(x, weights, ids):  # expert i is on rank i % RANKS
            stacked = [own(x, torch.where(ids % RANKS == r, weights, 0.0), ids) for r in range(RANKS)]
            return combine(torch.stack(stacked))

        return apply

    return each_moe(engine, make)


FAULTS = (
    Fault("split-K for few rows", 1, split_k.__doc__, "batch size", split_k, BOTH, seam=_LINEAR),
    Fault("RMSNorm block at 256 rows", 2, norm_by_rows.__doc__, "batch size", norm_by_rows, BOTH, "norm", seam=_NORM),
    Fault(
        "cached prompt's last row",
        7,
        experts_of_one_row.__doc__,
        "prefix cache",
        experts_of_one_row,
        BOTH,
        "mlp.experts",
        seam=EXPERTS,
    ),
    Fault(
        "prefix of an aborted prompt",
        7,
        aborted_prefix.__doc__,
        "aborts and stops",
        aborted_prefix,
        BOTH,
        "attn",
        "KV cache",
    ),
    Fault(
        "stale prompt-logprobs buffer",
        8,
        stale_buffer.__doc__,
        "prompt logprobs",
        stale_buffer,
        BOTH,
        "model runner",
        "prompt logprobs",
        seam={"cpu": "", "cuda": ""},
    ),
    Fault(
        "experts added by atomics",
        10,
        experts_by_rows.__doc__,
        "batch size",
        experts_by_rows,
        BOTH,
        "mlp.experts",
        seam=EXPERTS,
    ),
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
        "ties of top logprobs by rows",
        13,
        ties_by_rows.__doc__,
        "tied logits and routers",
        ties_by_rows,
        BOTH,
        "sampler",
        seam=_TOP,
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
        "combine by data-parallel rank",
        16,
        combine_by_rank.__doc__,
        "position and order",
        combine_by_rank,
        BOTH,
        "mlp.experts",
        "combine",
        seam=EXPERTS,
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
        "one generator for the batch",
        21,
        one_generator.__doc__,
        "seeded sampling",
        one_generator,
        BOTH,
        "topk_topp_sampler",
        seam=_DRAW,
    ),
    Fault(
        "seeds drawn on arrival",
        29,
        seeds_on_arrival.__doc__,
        "unseeded sets",
        seeds_on_arrival,
        BOTH,
        "sampler",
        "seed",
        seam={"cpu": "seeds.request", "cuda": "seeds.request"},
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
    Fault(
        "grammar library of the first request",
        28,
        first_library.__doc__,
        "structured output",
        first_library,
        BOTH,
        "structured output",
        "grammar mask",
        seam={"cpu": "structured.compile", "cuda": "structured.compile"},
    ),
    Fault(
        "processor counts its calls",
        29,
        calls_counted.__doc__,
        "custom logits processors",
        calls_counted,
        (CPU,),  # model runner V2 tells a processor which rows belong to an unfinished prompt
        "sampler",
        seam={"cpu": ""},
    ),
    Fault(
        "top-p masks every row",
        27,
        masked_by_company.__doc__,
        "processed logprobs",
        masked_by_company,
        BOTH,
        "topk_topp_sampler",
        seam={"cpu": "sampling.cpu_top_k_top_p", "cuda": "sampling.cuda_top_k_top_p"},
        emulated=(CUDA,),
    ),
)
