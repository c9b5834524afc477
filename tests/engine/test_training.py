"""A trainer on transformers beside the real engine: every logprob has the sampler's bits, in every form of a batch."""

import json
import os
import subprocess
import sys

import pytest

from bi_patch.tools.models import families, recipes

pytestmark = pytest.mark.engine

# The engine and the trainer share one process, as in a trainer's colocate mode.
CODE = """
import gc, json, os, sys
import bi_patch
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from bi_patch import training
from bi_patch.errors import BiPatchError, RoutingDiffers
from bi_patch.ops import bits
from bi_patch.ops.cpu import moe as routing
from bi_patch.tools.verify.weights import fill

KINDS = [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.3, "top_k": 50},
         {"temperature": 0.6, "top_k": 20, "top_p": 0.95}, {"temperature": 0.0}]
LENGTHS = (5, 17, 300, 3, 33, 9)


def prompts():
    drawn = torch.Generator().manual_seed(1)
    return [{"prompt_token_ids": torch.randint(3, 2000, (n,), generator=drawn).tolist()} for n in LENGTHS]


def forms(model, outputs, params, batch):
    pairs = {side: training.batch(outputs, params, side=side) for side in ("right", "left")}
    found = {side: training.compare(training.logprobs(model, held), held) for side, held in pairs.items()}
    apart = [training.batch([o], [p]) for o, p in zip(outputs, params)]
    alone = [training.compare(training.logprobs(model, held), held) for held in apart]
    found["alone"] = training.Parity(sum(p.compared for p in alone), sum(p.differing for p in alone), None, 0.0)
    real = batch.attention_mask.bool()
    ends = batch.attention_mask.sum(1).cumsum(0)
    own = {} if processed is False else {
        name: getattr(batch, name).expand(batch.ids.shape)[real] for name in ("temperature", "top_k", "top_p")
    }
    flat = batch.ids[real]
    packed = training.logprobs(model, flat, cu_seqlens=torch.cat((ends.new_zeros(1), ends)), **own)
    found["packed"] = training.compare(packed, batch.logprobs[real], batch.sampled[real])
    model.train()
    model.gradient_checkpointing_enable()
    scored = training.logprobs(model, batch)
    scored[batch.sampled].sum().backward()
    found["checkpointing"] = training.compare(scored, batch)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    model.gradient_checkpointing_disable()
    return found


def choose(llm, outputs, layers):
    # Lets the engine's routers run over each whole sequence, and puts what they chose into the answers, where an engine
    # with enable_return_routed_experts puts it. vLLM's CPU build has no such option.
    own, seen = routing.softmax_topk, []
    routing.softmax_topk = lambda *given: seen.append(own(*given)) or seen[-1]
    for output in outputs:
        llm.reset_prefix_cache()
        seen.clear()
        ids = output.prompt_token_ids + list(output.outputs[0].token_ids)
        asked = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        llm.generate([{"prompt_token_ids": ids[:-1]}], asked, use_tqdm=False)
        chosen = [torch.cat([ids for _, ids in seen[layer::layers]]) for layer in range(layers)]
        output.outputs[0].routed_experts = torch.stack(chosen, 1).numpy().astype("uint8")
    routing.softmax_topk = own


def experts(llm, model, outputs, params):
    choose(llm, outputs, model.config.num_hidden_layers)
    batch = training.batch(outputs, params)
    found = training.compare(training.logprobs(model, batch), batch, strict=True).routing
    tokens = int(batch.attention_mask.sum()) - len(outputs)  # all but the last of each sequence
    assert found.compared == tokens * model.config.num_hidden_layers * model.config.num_experts_per_tok
    outputs[2].outputs[0].routed_experts[7, 1] += 1
    try:
        spoiled = training.batch(outputs, params)
        training.compare(training.logprobs(model, spoiled), spoiled, strict=True)
    except RoutingDiffers as error:
        named = str(error)
    assert "row 2, position 7, layer 1" in named
    return training.Parity(found.compared, found.differing, None, 0.0)


def cuts(model, outputs, params):
    grads = []
    for size in (6, 1):
        with training.gradients(model):
            for at in range(0, 6, size):
                part = training.batch(outputs[at : at + size], params[at : at + size])
                training.logprobs(model, part)[part.sampled].sum().backward()
        grads.append([p.main_grad for p in model.parameters()])
    differing = sum(bits.differing(a, b) for a, b in zip(*grads))
    return training.Parity(sum(g.numel() for g in grads[0]), differing, None, 0.0)


def weights(path):  # random, beside a config.json
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
    fill(made, 7)
    made.bfloat16().save_pretrained(path)


for path, dtype, mode, compiled in json.loads(sys.argv[1]):
    if not any(name.endswith("safetensors") for name in os.listdir(path)):
        weights(path)
    processed = mode == "processed_logprobs"
    llm = LLM(path, dtype=dtype, max_model_len=512, enforce_eager=not compiled, max_num_seqs=4, seed=0,
              max_num_batched_tokens=128, logprobs_mode=mode, skip_tokenizer_init=True)
    params = [SamplingParams(seed=7 + i, max_tokens=16 + i, logprobs=0, ignore_eos=True, detokenize=False,
                             **(kind if processed else {})) for i, kind in enumerate(KINDS)]
    outputs = llm.generate(prompts(), params, use_tqdm=False)
    batch = training.batch(outputs, params)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="eager")
    with torch.no_grad():
        plain = model(batch.ids, attention_mask=batch.attention_mask).logits.float()[:, :-1]
    plain = (plain / (batch.temperature[..., None] if processed else 1)).log_softmax(-1)
    plain = torch.nn.functional.pad(plain.gather(-1, batch.ids[:, 1:, None])[..., 0], (1, 0))
    found = {"stock": training.compare(plain, batch)}
    training.arm(model, sampler=llm)
    found |= forms(model, outputs, params, batch)
    if hasattr(model.config, "num_experts_per_tok"):
        found |= {"experts": experts(llm, model, outputs, params), "cuts": cuts(model, outputs, params)}
    training.disarm(model)
    if dtype == "bfloat16":
        wide = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        try:
            training.arm(wide, sampler=llm)
        except BiPatchError as error:
            named = str(error)
        training.arm(wide, sampler=llm, dtype=torch.bfloat16)
        found["master weights"] = training.compare(training.logprobs(wide, batch), batch)
        assert "dtype is 'float32' in the trainer and 'bfloat16' in the sampler" in named
    print("FOUND " + json.dumps({k: [p.compared, p.differing, str(p)] for k, p in found.items()}), flush=True)
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    gc.collect()
"""

RAW, PROCESSED = "raw_logprobs", "processed_logprobs"
RUNS = [
    (recipes.LLAMA, "bfloat16", RAW, False),
    (recipes.LLAMA, "float32", PROCESSED, False),
    (recipes.QWEN3, "bfloat16", PROCESSED, True),  # compiled
    ("Qwen2.5", "bfloat16", RAW, False),
    ("Gemma 3", "bfloat16", RAW, False),
    ("Gemma 2", "bfloat16", PROCESSED, False),  # soft caps
    (recipes.MOE, "bfloat16", RAW, False),
]
# The unit tests compare the forms of a batch for these families, too, except Mixtral, whose kind of layers RUNS has.
MORE = [
    (recipes.QWEN3, "float32", RAW, False),
    ("Mistral", "bfloat16", RAW, False),
    ("Mixtral", "bfloat16", RAW, False),
]


WITH_EXPERTS = ("Mixtral", recipes.MOE)


@pytest.fixture(scope="module")
def found(model, cache, tmp_path_factory):
    """found(runs): by model and dtype, the comparisons by form of the batch, as (compared, differing, words). All of
    `runs` in one process."""
    held = {}

    def of(runs):
        if id(runs) not in held:
            held[id(runs)] = measured(runs, model, cache, tmp_path_factory.mktemp("training"))
        return held[id(runs)]

    return of


def measured(runs, model, cache, folder):
    """The comparisons of `runs`, by model and dtype."""

    def path(name):
        return families.write(name, folder) if name in families.FAMILIES else model(name)

    given = json.dumps([(path(name), *rest) for name, *rest in runs])
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BI_PATCH", "VLLM_BATCH"))}
    own = {"BI_PATCH_CACHE": str(cache), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    script = folder / "run.py"
    script.write_text(CODE)
    done = subprocess.run(
        [sys.executable, str(script), given],
        env=clean | own | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return dict(zip([run[:2] for run in runs], lines, strict=True))


@pytest.mark.parametrize("name, dtype, mode, compiled", RUNS)
def test_the_trainers_bits_are_the_samplers(found, name, dtype, mode, compiled):
    equal_in_every_form(found(RUNS)[name, dtype], name, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name, dtype, mode, compiled", MORE)
def test_the_bits_are_equal_for_more_families(found, name, dtype, mode, compiled):
    equal_in_every_form(found(MORE)[name, dtype], name, dtype)


def equal_in_every_form(forms, name, dtype):
    assert forms.pop("stock")[1] > 0  # the comparison sees a difference where one is
    expected = {"right", "left", "alone", "packed", "checkpointing"} | (
        {"master weights"} if dtype[0] == "b" else set()
    )
    of_experts = [forms.pop(form) for form in ("experts", "cuts") if form in forms]
    assert set(forms) == expected and len(of_experts) == 2 * (name in WITH_EXPERTS)
    assert all(compared and not differing for compared, differing, _ in of_experts)
    for form, (compared, differing, words) in forms.items():
        assert compared == sum(16 + i for i in range(6)) and differing == 0, f"{form}: {words}"
