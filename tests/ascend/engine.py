"""Runs vLLM's armed engine with vLLM-Ascend's worker on npu:0: scheduler, Qwen3, layers, attention and sampler.

`engine.py dense|experts FOLDER`. The engine answers one set of requests alone, together, from the prefix cache, and
with its own decoded tokens as prompts; the dense model also with preemption and sampling. The script compares tokens
and log-probabilities bitwise. The bundled kernels compute every sum in Triton's interpreter; host_ops serves operators
that move rows.

- `fault` plants a fault after these comparisons: keys are cut by the number of rows.
- `ascendc`: the AscendC package (or its double) serves, with whole prompts, no prefix cache, and preemption refused.
- `compiled`: the engine runs the graph that vLLM compiles and cuts into pieces. ACL graphs are not captured, so only
  steps that are too long for a captured graph run.

Prints one JSON object: the number of positions compared, and the number of differing positions per axis, also "with the
fault".
"""

import gc
import json
import struct
import sys
from pathlib import Path

import stand_ins

HIDDEN, HEADS, KV_HEADS, HEAD, INNER, VOCAB, LAYERS, EXPERTS = 32, 4, 2, 16, 48, 96, 2, 4
# Tokens per step. The long prompts are cut into chunks, alone at other places than beside other requests. STEPS: as few
# decoded tokens as take the long prompts over the end of a block, which the cached block and the preemption need.
BUDGET, BLOCK, STEPS = 96, 128, 3
LENGTHS = (127, 5, 127, 1)


def write_model(folder: Path, experts: bool) -> None:
    """Write a random Qwen3 as a checkpoint in Hugging Face's format: dense with biases, or with experts."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(7)

    def weight(*shape, scale=0.3):
        return (torch.randn(*shape, generator=generator) * scale).bfloat16()

    config = {
        "architectures": ["Qwen3MoeForCausalLM" if experts else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if experts else "qwen3",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "attention_bias": not experts,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if experts:
        config |= {
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": INNER,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    tensors = {"model.embed_tokens.weight": weight(VOCAB, HIDDEN), "lm_head.weight": weight(VOCAB, HIDDEN)}
    tensors["model.norm.weight"] = weight(HIDDEN, scale=1)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        tensors[f"{layer}.input_layernorm.weight"] = weight(HIDDEN, scale=1)
        tensors[f"{layer}.post_attention_layernorm.weight"] = weight(HIDDEN, scale=1)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = weight(heads * HEAD, HIDDEN)
            if not experts:
                tensors[f"{layer}.self_attn.{name}_proj.bias"] = weight(heads * HEAD)
        tensors[f"{layer}.self_attn.o_proj.weight"] = weight(HIDDEN, HEADS * HEAD)
        for name in ("q_norm", "k_norm"):
            tensors[f"{layer}.self_attn.{name}.weight"] = weight(HEAD, scale=1)
        if experts:
            tensors[f"{layer}.mlp.gate.weight"] = weight(EXPERTS, HIDDEN)
        for place in [f"experts.{e}." for e in range(EXPERTS)] if experts else [""]:
            for name in ("gate_proj", "up_proj"):
                tensors[f"{layer}.mlp.{place}{name}.weight"] = weight(INNER, HIDDEN)
            tensors[f"{layer}.mlp.{place}down_proj.weight"] = weight(HIDDEN, INNER)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, str(folder / "model.safetensors"))


def leaves_follow_the_rows() -> None:
    """Plant a fault: with few rows, keys are cut into smaller leaves, as a split-KV heuristic does."""
    from bi_patch.kernels.ascend import attention

    stock = attention.attention

    def attend(query, *args, **kwargs):
        attention.LEAF = 64 if query.shape[0] < 20 else 128
        return stock(query, *args, **kwargs)

    attention.attention = attend


def bits(number: float) -> int:
    return struct.unpack("<I", struct.pack("<f", number))[0]


def model_runner() -> type:
    """The class of vLLM-Ascend's model runner."""
    import vllm_ascend.ops  # noqa: F401  first, because the runner's own imports form a circle
    from vllm_ascend.worker.model_runner_v1 import NPUModelRunner

    return NPUModelRunner


class Engine:
    """The engine in this process, with a record of its scheduler: the tokens of each step, and preemptions."""

    def __init__(self, model: Path, **options):
        import vllm

        if options.get("enforce_eager", True):
            model_runner().profile_run = lambda self: None  # the stub has no memory to measure
        gc.freeze()  # vLLM collects garbage when it starts, and would visit all that was imported
        self.vllm = vllm
        usual = {"max_num_batched_tokens": BUDGET, "enable_prefix_caching": True, "max_model_len": 256}
        options = usual | {"enforce_eager": True} | options
        self.llm = vllm.LLM(
            model=str(model),
            load_format="safetensors",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            num_gpu_blocks_override=16,
            block_size=BLOCK,
            max_num_seqs=4,
            seed=0,
            disable_log_stats=True,
            **options,
        )
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.steps, self.preempted = [], 0
        schedule, preempt = self.scheduler.schedule, self.scheduler._preempt_request

        def seen_schedule(*args, **kwargs):
            made = schedule(*args, **kwargs)
            self.steps.append(sorted(made.num_scheduled_tokens.values()))
            return made

        def seen_preempt(*args, **kwargs):
            self.preempted += 1
            return preempt(*args, **kwargs)

        self.scheduler.schedule, self.scheduler._preempt_request = seen_schedule, seen_preempt

    def run(self, prompts: list[list[int]], keep_cache: bool = False, prompt_logprobs: bool = False, **sampling):
        """For each prompt: the decoded tokens with the bits of their log-probabilities, and the same for the prompt.

        keep_cache: do not clear the prefix cache first.
        """
        if not keep_cache:
            assert self.llm.reset_prefix_cache()
        self.steps.clear()
        how = {"temperature": 0, "max_tokens": STEPS, "logprobs": 3, "detokenize": False, "ignore_eos": True} | sampling
        params = [
            self.vllm.SamplingParams(**how, prompt_logprobs=1 if prompt_logprobs else None, seed=9 + i)
            for i in range(len(prompts))
        ]
        inputs = [self.vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = self.llm.generate(inputs, params, use_tqdm=False)
        self.cached = [output.num_cached_tokens for output in outputs]  # tokens taken from the prefix cache

        def rows(held):
            return [sorted((token, bits(entry.logprob)) for token, entry in row.items()) for row in held]

        answers = []
        for output in outputs:
            made = output.outputs[0]
            generated = list(zip(made.token_ids, rows(made.logprobs), strict=True))
            answers.append((generated, rows(output.prompt_logprobs[1:]) if prompt_logprobs else []))
        return answers


def differing(got, want) -> int:
    """How many positions differ in any bit, or exist in only one of `got` and `want`."""
    flat = [[entry for answer in side for part in answer for entry in part] for side in (got, want)]
    return abs(len(flat[0]) - len(flat[1])) + sum(a != b for a, b in zip(*flat, strict=False))


def decoded_as_a_prompt(engine: Engine, prompt: list[int], decoded: list) -> tuple[int, int]:
    """Give the prompt with its decoded tokens as a new prompt.

    Returns two numbers of differences: of the next tokens, with the first block from the prefix cache, and of the
    decoded tokens' log-probabilities.
    """
    longer = [prompt + [token for token, _ in decoded]]
    warm = engine.run(longer, keep_cache=True, max_tokens=2)
    cached = engine.cached
    (whole,) = engine.run(longer, prompt_logprobs=True, max_tokens=2)
    engine.cached = cached
    pairs = zip(decoded, whole[1][-STEPS:], strict=True)
    return differing(warm, [(whole[0], [])]), sum(dict(row)[t] != dict(entry)[t] for (t, row), entry in pairs)


def preempted_pair(engine: Engine, prompts: list[list[int]]):
    """Run two requests that each need a second block while only two blocks are free, so that one is preempted."""
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert engine.llm.reset_prefix_cache()
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 2)
    pair = engine.run(prompts, keep_cache=True)
    pool.free_blocks(taken)
    return pair


def refusal(run) -> str:
    """The text of the UnsupportedFeature that `run` raises; "" if it raises none."""
    from bi_patch.errors import UnsupportedFeature

    try:
        run()
    except UnsupportedFeature as error:
        return str(error)
    except Exception as error:  # vLLM's configuration wraps the error
        return str(error) if "batch invariance" in str(error) else ""
    return ""


def whole_prompts(folder: Path) -> None:
    """With the AscendC package: compare requests alone and together, with no prompt cut into chunks."""
    import batch_invariant_ops
    import torch

    refused = {"chunks and prefixes": refusal(lambda: Engine(folder))}
    engine = Engine(
        folder, max_model_len=144, max_num_batched_tokens=144, enable_prefix_caching=False, enable_chunked_prefill=False
    )
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (30, 5, 1)]
    alone = [engine.run([prompt], prompt_logprobs=True)[0] for prompt in prompts]
    found = {"batch": differing(engine.run(prompts, prompt_logprobs=True), alone)}
    calls = dict(batch_invariant_ops.CALLS)
    request = next(iter(engine.scheduler.requests.values()), None)
    refused["preemption"] = refusal(lambda: engine.scheduler._preempt_request(request, 0.0))
    compared = sum(len(part) for answer in alone for part in answer)
    print(json.dumps({"compared": compared, "differing": found, "refused": refused, "calls": calls}), flush=True)


def compiled_pieces(folder: Path) -> None:
    """Compare prompts longer than the largest graph, alone and together, in the compiled pieces."""
    import torch

    model_runner().capture_model = lambda self: 0
    compilation = {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [1]}
    engine = Engine(folder, enforce_eager=False, compilation_config=compilation, enable_prefix_caching=False)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (5, 17, 3)]
    how = {"prompt_logprobs": True, "max_tokens": 1}
    alone = [engine.run([prompt], **how)[0] for prompt in prompts]
    found = {"batch": differing(engine.run(prompts, **how), alone)}
    mode = engine.llm.llm_engine.vllm_config.compilation_config.mode
    compared = sum(len(part) for answer in alone for part in answer)
    print(json.dumps({"compared": compared, "differing": found, "mode": mode.name}), flush=True)


def main(experts: bool, folder: Path, fault: bool) -> None:
    import torch

    engine = Engine(folder)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]
    found, ways, alone, cuts = {}, {}, [], []
    for prompt in prompts:
        alone += engine.run([prompt], prompt_logprobs=True)
        cuts.append([n for step in engine.steps for n in step])
    together = engine.run(prompts, prompt_logprobs=True)
    found["batch and chunks"] = differing(together, alone)
    ways |= {"cuts alone": cuts, "steps together": list(engine.steps)}
    found["prefix cache"], found["decode = prefill"] = decoded_as_a_prompt(engine, prompts[0], alone[0][0])
    ways["cached tokens"] = engine.cached
    if not experts:  # the scheduler's and the sampler's axes, whatever the layers are
        pair = preempted_pair(engine, [prompts[0], prompts[2]])
        found["preemption"] = differing(pair, [(alone[0][0], []), (alone[2][0], [])])
        ways["preempted"] = engine.preempted
        drawn = {"temperature": 1.0, "top_k": 20, "top_p": 0.9}
        beside = engine.run(prompts[1:2] + prompts[3:], **drawn)
        found["seeded sampling"] = differing(beside[:1], engine.run(prompts[1:2], **drawn))
    compared = sum(len(part) for answer in together for part in answer)
    told = {"compared": compared, "differing": found, "ways": ways}
    if fault:
        leaves_follow_the_rows()
        decoded = engine.run(prompts[:1])[0][0]
        told["with the fault"] = {"decode = prefill": decoded_as_a_prompt(engine, prompts[0], decoded)[1]}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    stand_ins.modules()
    stand_ins.triton_driver()
    import canonical
    import host_ops
    import torch_npu  # noqa: F401

    import bi_patch  # noqa: F401  arms

    canonical.install()
    host_ops.install()
    checkpoint = Path(sys.argv[2])
    write_model(checkpoint, sys.argv[1] == "experts")
    if "ascendc" in sys.argv:
        whole_prompts(checkpoint)
    elif "compiled" in sys.argv:
        compiled_pieces(checkpoint)
    else:
        main(sys.argv[1] == "experts", checkpoint, "fault" in sys.argv)
