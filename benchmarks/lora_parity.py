"""Compares a trainer with a LoRA adapter of PEFT with an armed sampler, and its gradients with each other.

    PYTHONPATH=. python3 benchmarks/lora_parity.py [MODEL] [--dtype bfloat16] [--results FOLDER]

MODEL is a name of bi_patch/tools/models/recipes.py. Some adapters in turn, as the steps of a trainer make them: the
sampler gets each as a file, by a request with a new number. Requests without an adapter run beside them, and the
trainer computes these with its adapter switched off. Needs peft. Writes parity-*.json. Exit code 1: a value differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 8, 12  # the scaling is 1.5


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="tiny-llama")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def main() -> int:
    a = parse()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_BATCH_INVARIANT": "1"}
    import bi_patch  # noqa: F401  arms before vllm loads

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import peft
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from bi_patch import training
    from bi_patch.ops import bits
    from bi_patch.tools import evidence
    from bi_patch.tools.evidence import InvarianceRow, Parity
    from bi_patch.tools.models import recipes

    path, dtype = str(recipes.path(a.model)), getattr(torch, a.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30} if device == "cuda" else {}
    llm = LLM(
        path,
        dtype=a.dtype,
        max_model_len=512,
        max_num_seqs=8,
        enforce_eager=not a.compiled,
        seed=0,
        enable_lora=True,
        max_lora_rank=16,
        max_loras=2,
        skip_tokenizer_init=True,
        **on_gpu,
    )
    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    torch.manual_seed(3)
    asked = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0)
    model = peft.get_peft_model(base, asked)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    training.arm(model, sampler=llm)
    draw = torch.Generator().manual_seed(1)
    prompts = [
        {"prompt_token_ids": torch.randint(3, 500, (n,), generator=draw).tolist()} for n in (5, 17, 140, 3, 33, 9)
    ]
    params = [
        SamplingParams(seed=7 + i, max_tokens=16 + i, logprobs=0, ignore_eos=True, detokenize=False)
        for i in range(len(prompts))
    ]
    rows, folder = [], Path(tempfile.mkdtemp())
    label = f"{a.model} LoRA, {a.dtype}{', compiled' if a.compiled else ''}"

    def add(what: str, compared: int, differing: int, first: str = "") -> None:
        print(f"{label}: {what}: {differing} of {compared:,} differ {first}", flush=True)
        rows.append(InvarianceRow(label, what, compared, differing, first))

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(a.steps):
        place = folder / str(step)
        model.save_pretrained(place)
        adapter = LoRARequest(f"step {step}", step + 1, str(place))
        answers = llm.generate(
            prompts + prompts, params + params, use_tqdm=False, lora_request=[adapter] * 6 + [None] * 6
        )
        for what, part in (("with the adapter", answers[:6]), ("without an adapter", answers[6:])):
            for side in ("right", "left"):
                batch = training.batch(part, params, side=side, device=device)
                with torch.no_grad():
                    if what == "with the adapter":
                        new = training.logprobs(model, batch)
                    else:
                        with model.disable_adapter():
                            new = training.logprobs(model, batch)
                found = training.compare(new, batch)
                add(f"{what}, step {step}, padded {side}", found.compared, found.differing, str(found))
        grads = []
        for cut in (6, 1):
            with training.gradients(model):
                for at in range(0, 6, cut):
                    held = training.batch(answers[at : at + cut], params[at : at + cut], device=device)
                    (training.logprobs(model, held)[held.sampled].sum() / 100).backward()
            grads.append({n: p.main_grad for n, p in model.named_parameters() if p.requires_grad})
        wrong = sum(bits.differing(grads[0][n], grads[1][n]) for n in grads[0])
        add(f"gradients of micro-batches of 6 and 1, step {step}", sum(g.numel() for g in grads[0].values()), wrong)
        model.zero_grad()
        held = training.batch(answers[:6], params, device=device)
        (training.logprobs(model, held)[held.sampled].sum() / 100).backward()
        worst = max(
            float((p.grad.float() - grads[0][n]).norm() / p.grad.float().norm())
            for n, p in model.named_parameters()
            if p.requires_grad
        )
        add(f"gradients far from autograd's, step {step}", len(grads[0]), int(worst > 0.05), f"by up to {worst:.2g}")
        optimizer.step()
    with torch.no_grad():
        batch = training.batch(answers[6:], params, device=device)
        apart = training.compare(training.logprobs(model, batch), batch)
    if not apart.differing:
        add("the adapter changes nothing", 1, 1)
    import types

    import vllm

    info = types.SimpleNamespace(
        device=device_name(), vllm=vllm.__version__, torch=str(torch.__version__), threads=torch.get_num_threads()
    )
    made = evidence.new(Parity, info)
    made.rows = rows
    a.results.mkdir(parents=True, exist_ok=True)
    print(evidence.write(made, a.results), flush=True)
    return int(any(row.differing for row in rows))


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    from bi_patch.tools.verify.engine import cpu_name

    return f"{cpu_name()} ({os.cpu_count()} cores)"


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
