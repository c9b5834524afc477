"""Faults in what requests ask for, the same on every platform: draws, logprobs, grammars, prompts and aborts."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections.abc import Iterator

import torch

from bi_patch.tools.faults import parts
from bi_patch.tools.faults.base import BOTH, CPU, CUDA, FEW, Fault, platform
from bi_patch.tools.verify.engine import LocalEngine
from bi_patch.tools.verify.runner import model_runner, replaced

_DRAW = {"cpu": "sampling.cpu_draw", "cuda": "sampling.cuda_top_k_top_p"}
_TOP = {"cpu": "sampling.cpu_gather_logprobs", "cuda": "sampling.cuda_gather_logprobs"}


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


def first_generator(engine: LocalEngine):
    """A later part of a streamed input draws on from the generator of its first part."""
    runner, original = model_runner(engine), parts.original("streamed.seeds")
    return replaced(runner, "_update_streaming_request", lambda _: functools.partial(original, runner))


def block_given_away(engine: LocalEngine):
    """While a streamed input waits for its next part, the last block of its keys and values serves another request."""
    scheduler, runner = engine.core.scheduler, model_runner(engine)

    def wrap(held):
        def _update_request_as_session(session, update):
            last = scheduler.kv_cache_manager.get_block_ids(session.request_id)[0][-1]
            for cache in runner.kv_caches:
                axis = list(cache.shape).index(runner.kv_cache_config.num_blocks)
                cache.movedim(axis, 0)[last] = 0
            return held(session, update)

        return _update_request_as_session

    return replaced(scheduler, "_update_request_as_session", wrap)


def idle_draws(engine: LocalEngine):
    """At the end of a pause, each seeded request that runs has drawn once more."""
    core, runner = engine.core, model_runner(engine)

    def wrap(held):
        def resume_scheduler():
            for state in runner.requests.values():
                if state.generator is not None:
                    torch.rand(1, generator=state.generator)
            return held()

        return resume_scheduler

    return replaced(core, "resume_scheduler", wrap)


FAULTS = (
    Fault(
        "block of a waiting session given away",
        7,
        block_given_away.__doc__,
        "streamed inputs",
        block_given_away,
        BOTH,
        "attn",
        emulated=BOTH,
    ),
    Fault(
        "generator of the first part",
        21,
        first_generator.__doc__,
        "streamed inputs",
        first_generator,
        (CPU,),  # model runner V2 draws by a request's seed and the position
        "sampler",
        seam={"cpu": "streamed.seeds"},
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
        "draws in a pause",
        29,
        idle_draws.__doc__,
        "pauses",
        idle_draws,
        (CPU,),  # model runner V2 draws by a request's seed and the position
        "sampler",
        seam={"cpu": "sampling.cpu_draw"},
        emulated=(CPU,),
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
