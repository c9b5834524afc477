"""The axes of batch invariance: one probe for each axis. Probes compare live engines' answers bitwise.

A Probe compares answers within one engine: the base engine or, with `options`, an engine started for the probe. A
CrossProbe sends the same requests to the base engine and to engines that differ (chunk budget, cache, KV size, a new
process) and compares the answers. Both take a Workload, so that they work for any model and device:

    workload = Workload.random(engine.info.vocab_size)
    for probe in PROBES:
        if not probe.missing(engine):
            result = probe.run(engine, workload)         # Result: axis, compared, differing, first
    for cross in CROSS_PROBES:
        expected = cross.collect(engine, workload)       # engine: the base options
        for change in cross.changes(engine):
            got = cross.collect(other_engine, workload)  # an engine of engine.options.but(**change.options)
            result = cross.judge(change, expected, got)

`cases`, instead of `run` and `judge`, yields every compared pair with everything that running it again needs.
A probe raises NotExercised when the cause that it tests did not occur: no preemption happened, no prefix was cached.
"""

from __future__ import annotations

from bi_patch.tools.verify.engine import HITS, PREEMPTIONS, Engine
from bi_patch.tools.verify.probes import (
    adapters,
    crossing,
    grammars,
    images,
    online,
    pooling,
    routing,
    sleeping,
    streaming,
    together,
    updating,
)
from bi_patch.tools.verify.probes.base import (
    Change,
    CrossProbe,
    NotExercised,
    Probe,
    Result,
    Run,
    Workload,
    config,
    either,
)
from bi_patch.tools.verify.probes.cache import (
    chunks,
    in_this_process,
    long_prompt,
    model_here,
    needs_blocks,
    needs_cache,
    needs_length,
    needs_processors,
    prefix_cache,
    processors,
    shared_prefix,
    takes_budgets,
)
from bi_patch.tools.verify.probes.company import (
    arrivals,
    batch_size,
    contents,
    mixed_lengths,
    needs_company,
    position,
)
from bi_patch.tools.verify.probes.leaving import leaving
from bi_patch.tools.verify.probes.scores import (
    decode_equals_prefill,
    logprob_orders,
    needs_one_form,
    processed_logprobs,
    prompt_logprobs,
    sampled,
    sampling_kinds,
    tied,
    unseeded,
)

__all__ = [
    "AXES",
    "CROSS_PROBES",
    "FEATURE_PROBES",
    "HITS",
    "OWN_PROBES",
    "PREEMPTIONS",
    "PROBES",
    "Change",
    "CrossProbe",
    "NotExercised",
    "ONLINE_PROBES",
    "Probe",
    "Result",
    "Run",
    "Workload",
    "batch_size",
    "config",
    "long_prompt",
    "needs_length",
    "prefix_cache",
]


def _names_no_seed(engine: Engine) -> str:
    return "vLLM names no seed in an answer" if engine.info.mode == "stock" else ""


# On the base engine.
PROBES = (
    Probe(
        "batch size",
        "concurrent greedy requests, across 256 rows and the captured graphs",
        batch_size,
        (1, 2, 3, 10, 12, 19, 26, 32),
        needs_company,
        seconds=6,
        pools=True,
    ),
    Probe(
        "position and order",
        "place in a batch of nine; others reversed",
        position,
        (8, 16),
        needs_company,
        seconds=4,
        pools=True,
    ),
    Probe(
        "late arrivals",
        "requests join and leave a running batch",
        arrivals,
        (20,),
        needs_company,
        seconds=1,
        pools=True,
    ),
    Probe(
        "mixed lengths",
        "each prompt beside many short ones, and beside a few long ones",
        mixed_lengths,
        (3, 4, 24),
        needs_company,
        seconds=2,
        pools=True,
    ),
    Probe(
        "co-batch contents",
        "the same shapes beside other tokens",
        contents,
        (11,),
        needs_company,
        seconds=4,
        pools=True,
    ),
    Probe(
        "prefix cache",
        "empty, full, partly full",
        prefix_cache,
        (6, 7),
        either(needs_cache, needs_blocks),
        seconds=1,
        pools=True,
    ),
    Probe(
        "shared prefix",
        "many requests with one prefix in common",
        shared_prefix,
        (5,),
        needs_company,
        seconds=2,
        pools=True,
    ),
    Probe(
        "aborts and stops",
        "beside and after requests that are aborted or end on a stop string",
        leaving,
        (6, 7, 20),
        needs_company,
        seconds=3,
    ),
    Probe(
        "streamed inputs",
        "requests whose prompts come in parts, against whole prompts",
        streaming.streaming,
        (7, 21, 29),
        either(needs_company, streaming.missing),
        seconds=3,
    ),
    Probe(
        "pauses",
        "the engine pauses in the middle of answers, and running requests keep or lose their keys and values",
        sleeping.pausing,
        (9, 29),
        either(needs_company, in_this_process),
        seconds=2,
    ),
    Probe(
        "chunk budget",
        "smaller budgets of tokens per engine step, set on the running engine",
        chunks,
        (6, 22, 24),
        takes_budgets,
        seconds=4,
        pools=True,
    ),
    Probe(
        "custom logits processors",
        "a processor that chooses tokens, over chunk budgets",
        processors,
        (29,),
        either(takes_budgets, needs_processors),
        seconds=6,
    ),
    Probe(
        "decode = prefill",
        "decode logprobs against prompt logprobs",
        decode_equals_prefill,
        (1, 2, 3, 25),
        needs_one_form,
        seconds=1,
    ),
    Probe(
        "prompt logprobs",
        "logprobs of the prompt, in each batch size",
        prompt_logprobs,
        (2, 8),
        needs_company,
        seconds=3,
    ),
    Probe(
        "logprobs in any order",
        "requests for no, few, many and prompt logprobs in one batch",
        logprob_orders,
        (8,),
        needs_company,
        seconds=5,
    ),
    Probe(
        "seeded sampling", "temperature 0.7, top-p 0.95, in each batch size", sampled, (21,), needs_company, seconds=3
    ),
    Probe(
        "kinds of sampling",
        "top-p, top-k, min-p, penalties side by side",
        sampling_kinds,
        (21,),
        needs_company,
        seconds=1,
    ),
    Probe(
        "unseeded sets",
        "sampled requests without seeds, each replayed alone from its answer's seed",
        unseeded,
        (29,),
        either(needs_company, _names_no_seed),
        seconds=3,
    ),
    Probe(
        "structured output",
        "grammars of two libraries side by side, in any order",
        grammars.structured,
        (28,),
        either(needs_company, grammars.needs_tokenizer),
        seconds=6,
    ),
    Probe(
        "processed logprobs",
        "logprobs after sampling's changes, beside other samplings",
        processed_logprobs,
        (27,),
        either(needs_company, model_here),
        seconds=2,
    ),
    Probe(
        "pooled vectors",
        "embeddings and scores of other lengths and with other activations, side by side",
        pooling.vectors,
        (33,),
        either(needs_company, pooling.missing),
        seconds=4,
        pools=True,
    ),
    Probe(
        "images",
        "made images beside, after and before others, in any order, on warm caches, in several steps",
        images.images,
        (36,),
        either(needs_company, in_this_process, images.missing),
        seconds=15,
    ),
    Probe(
        "long prompt",
        "up to 3,000 tokens, alone and in a batch",
        long_prompt,
        (3, 4),
        either(needs_company, needs_length),
        seconds=5,
    ),
)


def _float_head(engine: Engine) -> str:
    return f"weights are quantized ({engine.info.quantization})" if engine.info.quantization else ""


# On a running server.
ONLINE_PROBES = (
    Probe(
        "concurrent clients",
        "each client's answer among others against its answer alone, over HTTP",
        online.clients,
        (8, 20, 21),
        online.offline,
        seconds=40,
    ),
)

# Each on an engine started for the probe.
OWN_PROBES = (
    Probe(
        "tied logits and routers",
        "equal pairs of rows in the head and in routers",
        tied,
        (13,),
        either(_float_head, needs_company),
        seconds=5,
        options=lambda base: {"tied": True},
    ),
)

# Against the base engine.
CROSS_PROBES = (
    CrossProbe(
        "preemption",
        "a KV cache too small for the batch; the engine counts preemptions",
        crossing.few_blocks,
        crossing.crossing_blocks,
        crossing.preempted,
        causes=(9,),
        missing=crossing.needs_crossing,
    ),
    CrossProbe(
        "restart",
        "a new process with empty compile caches",
        crossing.restarted,
        crossing.everything,
        causes=(18,),
        pools=True,
    ),
    CrossProbe(
        "prefix cache off",
        "off against on",
        crossing.uncached,
        crossing.everything,
        causes=(6, 7),
        missing=needs_cache,
        pools=True,
    ),
    CrossProbe(
        "chunked prefill",
        "several chunk budgets, and off",
        crossing.chunk_changes,
        crossing.everything,
        causes=(6,),
        missing=crossing.needs_parts,
        pools=True,
    ),
    CrossProbe(
        "eager and compiled",
        "eager, compiled, graphs",
        crossing.compiled,
        crossing.everything,
        causes=(17, 18, 19),
        seconds=30,
        compiles=True,
        pools=True,
    ),
)

# Features that an engine may lack or refuse; their axes then do not apply.
FEATURE_PROBES = (
    Probe(
        "LoRA",
        "requests with an adapter, beside others with another or none; more adapters than slots",
        adapters.lora,
        (10, 34),
        adapters.missing,
        seconds=20,
        options=adapters.options,
        optional=True,
    ),
    adapters.WithoutProbe(
        "LoRA off",
        "requests without an adapter beside others with adapters, against an engine without LoRA",
        adapters.changes,
        adapters.plain,
        causes=(10, 34),
        missing=adapters.missing,
        seconds=10,
        optional=True,
        single=True,
    ),
    Probe(
        "features together",
        "adapters, n-gram speculation, grammars, logprobs and cached prefixes in one engine",
        together.together,
        (8, 10, 22, 28, 34, 35),
        adapters.missing,
        seconds=20,
        options=together.options,
        optional=True,
    ),
    Probe(
        "sleep and wake",
        "after the engine slept: the weights kept on the host, or loaded again",
        sleeping.sleeping,
        missing=sleeping.missing,
        seconds=5,
        options=sleeping.options,
        optional=True,
    ),
    Probe(
        "routed experts",
        "the experts that a caller gets back, in batches and on the warm cache",
        routing.routing,
        (8, 10, 13),
        routing.missing,
        seconds=5,
        options=routing.options,
        optional=True,
    ),
    updating.UpdateProbe(
        "weight update",
        "weights that a running engine gets, against an engine started with them; and back",
        updating.changes,
        updating.requests,
        causes=(31,),
        missing=updating.missing,
        seconds=20,
        single=True,
    ),
    CrossProbe(
        "thread count",
        "another number of threads of a CPU engine",
        crossing.threads,
        crossing.everything,
        causes=(26,),
        missing=crossing.needs_threads,
        pools=True,
    ),
    CrossProbe(
        "speculative decoding",
        "n-gram speculation, with 1, 3 and 8 drafts, against none",
        crossing.speculative,
        crossing.repeating,
        crossing.speculated,
        causes=(22, 35),
        optional=True,
    ),
    CrossProbe(
        "tensor parallel size",
        "other numbers of ranks against the engine's own",
        crossing.parallel,
        crossing.everything,
        causes=(14, 15),
        missing=crossing.needs_devices,
        optional=True,
    ),
)

AXES: tuple[Probe | CrossProbe, ...] = (*PROBES, *ONLINE_PROBES, *OWN_PROBES, *CROSS_PROBES, *FEATURE_PROBES)
