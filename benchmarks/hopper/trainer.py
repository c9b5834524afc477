"""Compares a Hugging Face trainer with its sampler on real shapes, and measures what the trainer costs.

    PYTHONPATH=. python3 benchmarks/hopper/trainer.py MODEL [--results FOLDER] [--sequences 64] [--length 2048] [--tp 2]

MODEL is a dense model of bi_patch/tools/models/shapes.py. Its weights are random, with a standard deviation of
fan_in**-0.5. The armed sampler answers --sequences prompts with sequences of --length tokens. The armed trainer
computes the logprob of every sampled token: all bits must be equal. Then the armed model and the same model as it is
take turns, with attention by PyTorch's choice ("sdpa") and by its FlashAttention ("flash"). It writes
parity-*.json and cost-*.json. In the cost rows, `stock` is the model as it is. Exit code 1: a logprob differs.

--tp: the sampler's ranks, each on a GPU. The trainer stays on the first GPU, and nothing is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import os
import statistics
import sys
import time
from pathlib import Path

import checkpoints
from checkpoints import SEED

PROMPT = 48  # tokens
CUT = 4  # sequences in a micro-batch


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--memory", type=float, default=0.35, help="the sampler's share of the GPU's memory")
    parser.add_argument("--cache", type=int, help="GiB of the KV cache; others may then use the card")
    return parser.parse_args()


def sample(folder: Path, vocabulary: int, a: argparse.Namespace):
    """Start the armed sampler and answer the prompts; returns (engine, answers, parameters)."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=a.length,
        max_num_seqs=a.sequences,
        gpu_memory_utilization=a.memory,
        kv_cache_memory_bytes=a.cache << 30 if a.cache else None,
        tensor_parallel_size=a.tp,
        seed=SEED,
    )
    draw = torch.Generator().manual_seed(SEED)
    prompts = torch.randint(100, vocabulary, (a.sequences, PROMPT), generator=draw).tolist()
    tokens = a.length - PROMPT
    parameters = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False)
        for i in range(a.sequences)
    ]
    began = time.perf_counter()
    answers = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], parameters)
    print(f"sampled in {time.perf_counter() - began:.1f} s", flush=True)
    return llm, answers, parameters


def compared(model, answers, parameters) -> tuple[int, int, float]:
    """(logprobs compared, how many differ, the largest difference) over all micro-batches."""
    import torch

    from bi_patch import training

    total, differing, worst = 0, 0, 0.0
    for at in range(0, len(answers), CUT):
        batch = training.batch(answers[at : at + CUT], parameters[at : at + CUT], device="cuda")
        with torch.no_grad():
            found = training.compare(training.logprobs(model, batch), batch)
        total, differing, worst = total + found.compared, differing + found.differing, max(worst, found.worst)
    return total, differing, worst


def plain(model, batch):
    """The logprobs of each token by the model as it is: [B, T - 1] fp32. The batch has no padding."""
    logits = model(batch.ids, use_cache=False).logits[:, :-1]
    return logits.float().log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]


def attention(name: str):
    """A context in which PyTorch's attention is the one of this name."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if name == "flash" else contextlib.nullcontext()


def seconds(run) -> float:
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def costs(armed, model, batch, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of a forward, and of a forward with backward, for each kind of trainer, in turns."""
    import torch

    from bi_patch import training

    def forward(which, logprobs):
        with torch.no_grad():
            logprobs(which, batch)

    def both(which, logprobs):
        logprobs(which, batch).sum().backward()
        which.zero_grad(set_to_none=True)

    def invariant():
        with training.gradients(armed):
            training.logprobs(armed, batch).sum().backward()
        for parameter in armed.parameters():
            parameter.main_grad = None

    def stock(name, kind):
        with attention(name):
            kind(model, plain)

    runs = {
        "forward": {
            "armed": lambda: forward(armed, training.logprobs),
            "sdpa": lambda: stock("sdpa", forward),
            "flash": lambda: stock("flash", forward),
        },
        "forward and backward": {
            "armed": lambda: both(armed, training.logprobs),
            "sdpa": lambda: stock("sdpa", both),
            "flash": lambda: stock("flash", both),
        },
        "forward and backward, gradients of any micro-batches": {"armed": invariant},
    }
    times: dict[str, dict[str, list[float]]] = {}
    for what, ways in runs.items():
        for run in ways.values():
            run()  # compile and load
        for _ in range(repeats):
            for name, run in ways.items():
                times.setdefault(what, {}).setdefault(name, []).append(seconds(run))
        print(what, {name: round(statistics.median(t), 4) for name, t in times[what].items()}, flush=True)
    times["forward and backward, gradients of any micro-batches"] |= {
        name: times["forward and backward"][name] for name in ("sdpa", "flash")
    }
    return times


def rows(label: str, tokens: int, times) -> list:
    from bi_patch.tools.evidence import CostRow

    made = []
    for what, ways in times.items():
        for other in ("sdpa", "flash"):
            ours, theirs = ways["armed"], ways[other]
            ratio = statistics.median(x / y for x, y in zip(ours, theirs))
            made.append(
                CostRow(
                    f"{label}, trainer",
                    f"{what}, {tokens} tokens, against {other}",
                    "s",
                    round(statistics.median(theirs), 5),
                    None,
                    round(statistics.median(ours), 5),
                    len(ours),
                    round(ratio, 4),
                    (round(min(theirs), 5), round(max(theirs), 5)),
                    (round(min(ours), 5), round(max(ours), 5)),
                )
            )
    return made


def main() -> int:
    a = parse()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_BATCH_INVARIANT": "1"}
    import bi_patch  # noqa: F401  arms before vllm loads

    folder, vocabulary = checkpoints.write(a.model, a.layers, f"/tmp/models/trainer-{os.getpid()}")
    gc.collect()
    import torch

    torch.cuda.empty_cache()
    llm, answers, parameters = sample(folder, vocabulary, a)
    from transformers import AutoModelForCausalLM

    from bi_patch import training
    from bi_patch.tools import evidence
    from bi_patch.tools.evidence import Cost, InvarianceRow, Parity

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
    armed = training.arm(copy.deepcopy(model), sampler=llm)
    total, differing, worst = compared(armed.eval(), answers, parameters)
    print(f"{differing} of {total:,} logprobs differ, by up to {worst:.3g}", flush=True)
    label = f"{a.model}{f', {a.layers} layers' if a.layers else ''}{f', sampler TP {a.tp}' if a.tp > 1 else ''}"
    info = _info()
    made = evidence.new(Parity, info)
    axis = f"{a.sequences} sequences of {a.length:,} tokens, micro-batches of {CUT}"
    made.rows = [InvarianceRow(label, axis, total, differing, f"by up to {worst:.3g}" if differing else "")]
    print(evidence.write(made, a.results), flush=True)
    if a.tp > 1:
        sys.stdout.flush()
        os._exit(1 if differing else 0)
    batch = training.batch(answers[:CUT], parameters[:CUT], device="cuda")
    times = costs(armed.train(), model.train(), batch, a.repeats)
    cost = evidence.new(Cost, info)
    cost.rows = rows(label, CUT * a.length, times)
    print(evidence.write(cost, a.results), flush=True)
    for row in cost.rows:
        print(row.workload, row.ratio, flush=True)
    sys.stdout.flush()
    os._exit(1 if differing else 0)


def _info():
    """What a result file says of this machine."""
    import types

    import torch
    import vllm

    from bi_patch.tools.verify.engine import cpu_name

    cuda = torch.cuda.is_available()
    return types.SimpleNamespace(
        device=torch.cuda.get_device_name() if cuda else f"{cpu_name()} ({os.cpu_count()} cores)",
        vllm=vllm.__version__,
        torch=str(torch.__version__),
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
