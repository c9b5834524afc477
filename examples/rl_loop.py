"""On-policy GRPO with plain PyTorch: the trainer's logprobs are the sampler's, bit for bit, in every step.

    python examples/rl_loop.py [MODEL] [STEPS]

Runs on a CPU. The reward is the share of digits in an answer. Another MICRO gives the same weights.
"""

# ruff: noqa: I001  bi_patch comes before vllm
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: weights are handed over, not copied
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import bi_patch  # noqa: F401  before vllm: it arms the engine
import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

from bi_patch import training

PROMPTS = ["The number of the house is", "My favourite numbers are", "In the year", "The price of the book is"]
GROUP, TOKENS, MICRO = 6, 24, 8


def main(name: str, steps: int) -> None:
    llm = LLM(name, dtype="bfloat16", max_model_len=512, enforce_eager=True)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).train()  # fp32 master weights
    training.arm(model, sampler=llm, dtype=torch.bfloat16)  # every operator rounds them, as the sampler has them
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
    for step in range(steps):
        prompts = [prompt for prompt in PROMPTS for _ in range(GROUP)]
        params = [
            SamplingParams(temperature=1.0, seed=1000 * step + i, max_tokens=TOKENS, logprobs=0)
            for i in range(len(prompts))
        ]
        answers = llm.generate(prompts, params, use_tqdm=False)
        rewards = torch.tensor([sum(c.isdigit() for c in a.outputs[0].text) / TOKENS for a in answers]).view(-1, GROUP)
        gains = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
        count = sum(len(a.outputs[0].token_ids) for a in answers)  # of the whole batch, known before the first part
        compared = 0
        with training.gradients(model):  # fp32, and the same for every MICRO
            for at in range(0, len(answers), MICRO):
                batch = training.batch(answers[at : at + MICRO], params[at : at + MICRO])
                new = training.logprobs(model, batch)
                compared += training.compare(new, batch, strict=True).compared  # raises if one bit differs
                ratio = (new - batch.logprobs).exp()  # exactly 1 before the update
                gain = ratio * gains[at : at + MICRO, None]
                (-gain[batch.sampled].sum() / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        training.sync(model, llm, version=f"step {step + 1}")  # raises if the sampler serves other weights
        print(f"step {step}: reward {rewards.mean():.4f}, gradient norm {norm:.6f}, {compared} logprobs equal, KL 0")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct", int((sys.argv[2:] or [4])[0]))
