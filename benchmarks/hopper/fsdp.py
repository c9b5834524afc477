"""Compares a trainer whose weights are sharded by FSDP2, on one GPU and on several, with its sampler.

    PYTHONPATH=. python3 benchmarks/hopper/fsdp.py MODEL [--layers 4] [--ranks 1 2] [--sequences 16] [--length 512]

MODEL is a name of bi_patch/tools/models/shapes.py or families.py. An armed sampler in a process of its own answers the
prompts, and leaves its answers and its contract in files. Then the trainer starts anew for each number of ranks, with
fp32 master weights that FSDP2 shards. Each rank computes a share of the sequences; forward and backward run in bf16,
and gradients are added in fp32. Compared are the logprobs, the gradients of a second run, and the weights after one
step of AdamW for the same ranks twice. Without a GPU, ranks are processes with gloo. Writes parity-*.json. Exit code 1:
something differs. 2: nothing was compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--memory", type=float, default=0.35, help="the sampler's share of the GPU's memory")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(f"/tmp/models/fsdp-{os.getpid()}"))
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def sampled(a: argparse.Namespace) -> None:
    """Write the model, the sampler's answers and its contract."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_BATCH_INVARIANT": "1"}
    import checkpoints
    import torch
    from experts import sample

    import bi_patch  # noqa: F401  arms before vllm loads

    folder, vocabulary = checkpoints.write(a.model, a.layers, str(a.work))
    llm, answers, parameters = sample(folder, vocabulary, a)
    from bi_patch import training

    training.contract.save(training.contract.of(llm), a.work / "contract.json")
    held = training.batch(answers, parameters)
    torch.save([held.ids, held.attention_mask, held.sampled, held.logprobs], a.work / "batch.pt")
    (a.work / "folder").write_text(str(folder))


def trained(a: argparse.Namespace, rank: int, size: int) -> None:
    """One rank of the trainer. Rank 0 prints what it found as JSON."""
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM

    import bi_patch  # noqa: F401  arms before vllm loads
    from bi_patch import training

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    device = f"cuda:{rank}" if on_gpu else "cpu"
    store = dist.FileStore(str(a.work / f"store-{size}"), size)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size)
    ids, mask, drawn, scores = (x[rank::size].to(device) for x in torch.load(a.work / "batch.pt"))
    folder = (a.work / "folder").read_text()

    def step():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        training.arm(model, sampler=str(a.work / "contract.json"), dtype=torch.bfloat16)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        model.train()
        model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        new = training.logprobs(model, ids, mask)
        found = training.compare(new, scores, drawn)
        (new[drawn].sum() / 1000).backward()
        grads = {name: p.grad.full_tensor().cpu() for name, p in model.named_parameters()}
        optimizer.step()
        return found, grads, {name: p.full_tensor().detach().cpu() for name, p in model.named_parameters()}

    first, grads, weights = step()
    second, grads_2, weights_2 = step()
    counts = torch.tensor([first.compared, first.differing, second.differing], device=device)
    dist.all_reduce(counts)
    if rank == 0:
        from bi_patch.ops import bits

        moved = sum(bits.differing(grads[name], grads_2[name]) for name in grads)
        stepped = sum(bits.differing(weights[name], weights_2[name]) for name in weights)
        norm = float(sum(g.double().square().sum() for g in grads.values()).sqrt())
        elements = sum(g.numel() for g in grads.values())
        print("FOUND " + json.dumps([counts.tolist(), elements, moved, stepped, norm]), flush=True)
    dist.destroy_process_group()


def main() -> int:
    a = parse()
    a.work.mkdir(parents=True, exist_ok=True)
    if a.part == "sampler":
        sampled(a)
        return 0
    if a.part:
        trained(a, *map(int, a.part.split("/")))
        return 0
    again = [sys.executable, *sys.argv, "--work", str(a.work), "--part"]
    subprocess.run([*again, "sampler"], check=True)
    import bi_patch_entry

    bi_patch_entry.without_arming()
    from trainer import _info

    from bi_patch.tools import evidence
    from bi_patch.tools.evidence import InvarianceRow, Parity

    made = evidence.new(Parity, _info())
    label = f"{a.model}{f', {a.layers} layers' if a.layers else ''}, FSDP2"
    for size in a.ranks:
        ranks = [subprocess.Popen([*again, f"{n}/{size}"], stdout=subprocess.PIPE, text=True) for n in range(size)]
        said = [rank.communicate()[0] for rank in ranks]
        lines = [line[6:] for line in said[0].splitlines() if line.startswith("FOUND ")]
        if any(rank.returncode for rank in ranks) or not lines:
            print(f"{size} ranks failed: {[rank.returncode for rank in ranks]}", flush=True)
            return 2
        (compared, differing, again_differing), elements, moved, stepped, norm = json.loads(lines[0])
        where = f"{size} rank{'s' * (size > 1)}, {a.sequences} sequences of up to {a.length:,} tokens"
        made.rows += [
            InvarianceRow(label, f"logprobs, {where}", 2 * compared, differing + again_differing),
            InvarianceRow(label, f"gradients, a second run, {where}", elements, moved),
            InvarianceRow(label, f"master weights after a step, a second run, {where}", elements, stepped),
        ]
        for row in made.rows[-3:]:
            print(
                f"{row.axis}: {row.differing} of {row.compared:,} differ; norm of the gradient {norm:.6g}", flush=True
            )
    a.results.mkdir(parents=True, exist_ok=True)
    print(evidence.write(made, a.results), flush=True)
    return 1 if any(row.differing for row in made.rows) else 2 * (not made.rows[0].compared)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
