"""Compares answers of an armed engine of few MLA layers, alone and in other ways, in this process.

    PYTHONPATH=. python3 benchmarks/hopper/mla_engine.py OUT.json [--mode MODE] [--eager] [--small] [--long]

--mode: armed, upstream (vLLM's own batch-invariant mode) or stock.
--small: a KV cache too small for the batch, without a prefix cache, so that requests are preempted and recomputed.
--cached: with a prefix cache, where a preempted request finds its own blocks.
--times: also the GPU's time of decode steps, without the host's.
--long: prompts that exceed vLLM's workspace of 65,536 tokens.
"""

import argparse
import functools
import json
import os
import random
import tempfile
import time

import child

START = time.time()


def begin(mode: str) -> None:
    """Before vLLM is imported."""
    child.environment(mode)
    if mode == "armed":
        import bi_patch  # noqa: F401
    else:
        import bi_patch_entry

        bi_patch_entry.without_arming()


def without_scales(weights) -> None:
    """Random weights as of a checkpoint that has no scales of the KV cache: vLLM takes 1."""
    filled = weights.fill

    @functools.wraps(filled)
    def fill(model, seed):
        filled(model, seed)
        for name, value in model.named_parameters():
            if name.endswith((".q_scale", ".k_scale", ".v_scale")):
                value.data.fill_(-1)

    weights.fill = fill


def _backends(config):
    """The names of the backends of the model's layers of attention."""
    layers = config.compilation_config.static_forward_context.values()
    return {layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--family", default="DeepSeek V2")
    parser.add_argument("--scheme", help="a name of schemes.py, instead of a family")
    parser.add_argument("--kv", default="auto", help="--kv-cache-dtype of the engine")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.4)
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--mode", choices=("armed", "upstream", "stock"), default="armed")
    a = parser.parse_args()
    begin(a.mode)
    import msgspec
    from families import SIZES
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.v1.core.sched.scheduler import Scheduler

    from bi_patch.seams import active
    from bi_patch.tools import provenance
    from bi_patch.tools.models import families, shapes
    from bi_patch.tools.verify import weights

    if a.scheme:
        import schemes

        name, config = schemes.label(a.scheme, a.layers), schemes.config(a.scheme, a.layers)
    else:
        name, config = a.family, families.FAMILIES.get(a.family, {}) | SIZES[a.family] | {"num_hidden_layers": a.layers}
    longest = 80000 if a.long else 2048
    config["max_position_embeddings"] = max(config.get("max_position_embeddings", 0), longest)
    name += "" if a.kv == "auto" else f", {a.kv} KV cache"
    folder = shapes.save(f"{name} {a.layers} {os.getpid()}", config, tempfile.mkdtemp())
    without_scales(weights)
    weights.make_random(7)
    preempted = [0]
    held = Scheduler._preempt_request

    def count(self, *args, **kwargs):
        preempted[0] += 1
        return held(self, *args, **kwargs)

    Scheduler._preempt_request = count
    more = {"num_gpu_blocks_override": 40, "block_size": 64, "enable_prefix_caching": a.cached} if a.small else {}
    llm = LLM(
        model=folder,
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=longest,
        max_num_batched_tokens=16384 if a.long else 2048,
        compilation_config={} if a.eager else {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]},
        enforce_eager=a.eager,
        gpu_memory_utilization=a.share,
        kv_cache_memory_bytes=3 << 30,
        kv_cache_dtype=a.kv,
        **more,
    )
    core = llm.llm_engine.engine_core.engine_core
    result = {
        "model": name,
        "layers": a.layers,
        "eager": a.eager,
        "small": a.small,
        "started_s": round(time.time() - START, 1),
    }
    result |= {"mode": a.mode, "mla": active.mla, "block": core.vllm_config.cache_config.block_size, "rows": []}
    result |= {"kv": a.kv, "backend": sorted(_backends(core.vllm_config))}
    result |= {"v2": core.vllm_config.use_v2_model_runner, "long": a.long, "cached": not a.small or a.cached}
    result["provenance"] = msgspec.to_builtins(provenance.here())
    worker = core.model_executor.driver_worker
    manager = getattr(getattr(worker, "worker", worker).model_runner, "cudagraph_manager", None)
    result["full_graphs"] = len(getattr(manager, "graphs", ()))

    def save():
        result["preempted"] = preempted[0]
        with open(a.out, "w") as file:
            json.dump(result, file, indent=0)

    save()
    tokens = 40 if a.small else 24
    lengths = [150 + 13 * i for i in range(14)] if a.small else [1, 3, 17, 40, 64, 65, 129, 290, 900, 1501]
    rng = random.Random(5)
    prompts = [[rng.randrange(10, 30000) for _ in range(n)] for n in lengths]

    def ask(some, n=tokens):
        made = llm.generate(
            [TokensPrompt(prompt_token_ids=p) for p in some],
            SamplingParams(temperature=0.0, max_tokens=n, min_tokens=n, ignore_eos=True, logprobs=0, detokenize=False),
            use_tqdm=False,
        )
        return [
            [(t, at[t].logprob) for t, at in zip(o.outputs[0].token_ids, o.outputs[0].logprobs, strict=True)]
            for o in made
        ]

    def compare(what, got, want):
        differing = sum(x != y for g, w in zip(got, want, strict=True) for x, y in zip(g, w, strict=True))
        tokens_differing = sum(x[0] != y[0] for g, w in zip(got, want, strict=True) for x, y in zip(g, w, strict=True))
        row = {
            "what": what,
            "compared": sum(map(len, want)),
            "differing": differing,
            "tokens": tokens_differing,
            "preempted": preempted[0],
            "at_s": round(time.time() - START, 1),
        }
        result["rows"].append(row)
        print(row, flush=True)
        save()

    def forget():
        llm.reset_prefix_cache()

    if a.long:
        long_prompts(ask, compare, forget, core.scheduler, rng)
        return

    alone = []
    for prompt in prompts:
        forget()
        alone += ask([prompt])
    result["distinct"] = len({x for answer in alone for x in answer})
    save()
    forget()
    compare("together", ask(prompts), alone)
    if a.small:
        compare("together again", ask(prompts[::-1])[::-1], alone)
        core.scheduler.max_num_scheduled_tokens = 100
        compare("together, budget 100", ask(prompts), alone)
        return
    compare("warm", ask(prompts), alone)
    compare("warm, one by one", [ask([p])[0] for p in prompts], alone)
    fillers = [[rng.randrange(10, 30000) for _ in range(rng.choice((1, 5, 16, 33, 70)))] for _ in range(150)]
    forget()
    compare("beside 150", ask([*fillers, *prompts])[150:], alone)
    # A conversation: the second prompt holds the first answer. Warm, as the first answer's blocks are cached.
    again = [[*p, *(t for t, _ in answer), 7, 8, 9] for p, answer in zip(prompts, alone, strict=True)]
    forget()
    cold = []
    for p in again:
        forget()
        cold += ask([p], 8)
    forget()
    ask(prompts)
    compare("second turn after the first", ask(again, 8), cold)
    # Prompts of which all but one token is cached.
    block = core.vllm_config.cache_config.block_size
    edge = [[rng.randrange(10, 30000) for _ in range(n * block + 1)] for n in (1, 2, 5)]
    forget()
    cold = []
    for p in edge:
        forget()
        cold += ask([p], 8)
    forget()
    ask([p[:-1] + [5] for p in edge], 2)
    compare("one token not cached", ask([*edge, *fillers], 8)[:3], cold)
    ask([p[:-1] + [5] for p in edge], 2)
    forget()
    ask([p[:-1] + [5] for p in edge], 2)
    compare("one token not cached, alone", [ask([p], 8)[0] for p in edge], cold)
    usual = core.scheduler.max_num_scheduled_tokens
    for budget in (33, 200, 500):
        core.scheduler.max_num_scheduled_tokens = budget
        forget()
        compare(f"together, budget {budget}", ask(prompts), alone)
    core.scheduler.max_num_scheduled_tokens = usual
    if a.times:
        times(llm, result, save)


def times(llm, result: dict, save) -> None:
    """Milliseconds of the GPU's kernels in a decode step, for some numbers of requests."""
    engine = child.Engine.__new__(child.Engine)
    engine.llm, engine.vocabulary, engine.count, engine.on_step = llm, 30000, 0, None
    result["times"] = []
    for number, length in ((1, 512), (8, 1024), (64, 512), (128, 512)):
        child.warm(engine, f"{number} x {length}/128")
        result["times"].append({"workload": f"{number} x {length}"} | child.gpu_cost(engine, number, length))
        print({k: v for k, v in result["times"][-1].items() if "kernels" not in k}, flush=True)
        save()


def long_prompts(ask, compare, forget, scheduler, rng):
    """Prompts of more tokens than the workspace holds, cut in several ways, cold and warm, beside others."""
    prompts = [[rng.randrange(10, 30000) for _ in range(n)] for n in (65500, 70001, 79000)]
    short = [[rng.randrange(10, 30000) for _ in range(n)] for n in (3, 150, 900)]
    whole = []
    for prompt in (*prompts, *short):
        forget()
        whole += ask([prompt], 8)
    forget()
    compare("long, together", ask([*prompts, *short], 8), whole)
    compare("long, warm", [ask([p], 8)[0] for p in prompts], whole[:3])
    forget()
    ask([p[:66000] for p in prompts], 2)
    compare("long, cached in part", ask([*prompts, *short], 8), whole)
    scheduler.max_num_scheduled_tokens = 5000
    forget()
    compare("long, budget 5000", ask([*short, *prompts], 8), [*whole[3:], *whole[:3]])


if __name__ == "__main__":
    main()
