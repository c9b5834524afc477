"""Compares a Hugging Face trainer with its sampler: logprobs, gradients, and the experts chosen, where there are any.

    PYTHONPATH=. python3 benchmarks/hopper/experts.py MODEL [--layers 2] [--sequences 16] [--length 512]

MODEL is a name of bi_patch/tools/models/shapes.py or of bi_patch/tools/models/families.py. Its weights are random, with
a standard deviation of fan_in**-0.5. The sampler returns the experts of each token (enable_return_routed_experts), and
the trainer's must be equal. Gradients: a second run, and the gradients of other micro-batches inside
training.gradients. It writes parity-*.json. Exit code 1: something differs. 2: nothing was compared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import checkpoints
from checkpoints import SEED

PROMPT = 24


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--memory", type=float, default=0.35, help="the sampler's share of the GPU's memory")
    parser.add_argument("--compiled", action="store_true", help="the sampler compiles, and takes CUDA graphs")
    return parser.parse_args()


def sample(folder: Path, vocabulary: int, a: argparse.Namespace):
    """Start the armed sampler and answer the prompts; returns (engine, answers, parameters)."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    config = json.loads((folder / "config.json").read_text())
    on_gpu = {"gpu_memory_utilization": a.memory, "kv_cache_memory_bytes": 1 << 30}  # others may use the card
    if any(config.get(name) for name in ("num_experts", "num_local_experts")):
        on_gpu["enable_return_routed_experts"] = True
    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype=a.dtype,
        max_model_len=a.length,
        max_num_seqs=a.sequences,
        enforce_eager=not a.compiled,
        seed=SEED,
        **(on_gpu if torch.cuda.is_available() else {}),
    )
    draw = torch.Generator().manual_seed(SEED)
    prompts = torch.randint(3, vocabulary, (a.sequences, PROMPT), generator=draw).tolist()
    parameters = [
        SamplingParams(
            temperature=1.0, seed=i, max_tokens=a.length - PROMPT - i, ignore_eos=True, logprobs=0, detokenize=False
        )
        for i in range(a.sequences)
    ]
    began = time.perf_counter()
    answers = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], parameters, use_tqdm=False)
    print(f"sampled in {time.perf_counter() - began:.1f} s", flush=True)
    return llm, answers, parameters


def gradients(model, answers, parameters, cut: int, device: str, invariant: bool):
    """The gradients of all weights over micro-batches of `cut` sequences, by name."""
    from bi_patch import training

    def run():
        for at in range(0, len(answers), cut):
            held = training.batch(answers[at : at + cut], parameters[at : at + cut], device=device)
            (training.logprobs(model, held)[held.sampled].sum() / 1000).backward()

    model.zero_grad(set_to_none=True)
    if not invariant:
        run()
        return {name: p.grad for name, p in model.named_parameters()}
    with training.gradients(model):
        run()
    return {name: p.main_grad for name, p in model.named_parameters()}


def main() -> int:
    a = parse()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_BATCH_INVARIANT": "1"}
    import bi_patch  # noqa: F401  arms before vllm loads

    folder, vocabulary = checkpoints.write(a.model, a.layers, f"/tmp/models/experts-{os.getpid()}")
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    llm, answers, parameters = sample(folder, vocabulary, a)
    from trainer import _info

    from bi_patch import training
    from bi_patch.ops import bits
    from bi_patch.tools import evidence
    from bi_patch.tools.evidence import InvarianceRow, Parity

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, a.dtype)).to(device)
    training.arm(model, sampler=llm)
    label = f"{a.model}{f', {a.layers} layers' if a.layers else ''}, {a.dtype}{', compiled' if a.compiled else ''}"
    rows = []

    def add(what: str, compared: int, differing: int, first: str = "") -> None:
        print(f"{label}: {what}: {differing} of {compared:,} differ {first}", flush=True)
        rows.append(InvarianceRow(label, what, compared, differing, first))

    size = f"{a.sequences} sequences of up to {a.length:,} tokens"
    whole = training.batch(answers, parameters, device=device)
    with torch.no_grad():
        new = training.logprobs(model, whole)
    found = training.compare(new, whole)
    add(f"logprobs, {size}", found.compared, found.differing, str(found) if found.differing else "")
    if found.routing is not None:
        add(f"experts chosen, {size}", found.routing.compared, found.routing.differing, found.routing.first)
    apart = [training.batch([answer], [asked], device=device) for answer, asked in zip(answers, parameters)]
    with torch.no_grad():
        alone = [training.compare(training.logprobs(model, held), held) for held in apart]
    add("logprobs, each sequence alone", sum(p.compared for p in alone), sum(p.differing for p in alone))
    for name, cuts, invariant in (
        ("gradients, a second run", (a.sequences, a.sequences), False),
        ("gradients, micro-batches of 1 and of all sequences", (a.sequences, 1), True),
    ):
        first, second = (gradients(model, answers[:8], parameters[:8], cut, device, invariant) for cut in cuts)
        count = sum(g.numel() for g in first.values())
        wrong = {n: bits.differing(first[n], second[n]) for n in first}
        add(name, count, sum(wrong.values()), next((n for n, k in wrong.items() if k), ""))
        if not all(bool(g.isfinite().all()) for g in first.values()):
            add(f"{name}: finite", count, count)
    made = evidence.new(Parity, _info())
    made.rows = rows
    a.results.mkdir(parents=True, exist_ok=True)
    print(evidence.write(made, a.results), flush=True)
    return 2 if not rows[0].compared else int(any(row.differing for row in rows))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
