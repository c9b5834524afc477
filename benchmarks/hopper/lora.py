"""LoRA's kernels on a GPU: bits over rows and company, and times, of vLLM's kernels and of the bundled pair.

    python benchmarks/hopper/lora.py OUT.json [--seconds 200] [--rows 256,2048]

For vLLM's kernels in the stock mode, vLLM's kernels in its batch-invariant mode, and the bundled kernels: how many
elements of a row differ between a batch of M rows and the whole batch, and with other adapters beside; microseconds of
a call, from a CUDA graph of many. Shapes: the linears of Llama-3.1-8B, 8 adapters.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import torch

LAYERS = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
ADAPTERS = 8
RANKS = (16, 256, 64, 8)
TIMED = (1, 8, 64, 256, 2048)
BITS = (1, 2, 3, 7, 8, 16, 17, 32, 33, 63, 64, 65, 127, 128, 129, 256, 300, 1024)
MODES = ("stock", "upstream", "bundled")
CALLS = 20


class Stacks:
    """Adapters of one rank for one layer, and a batch of rows."""

    def __init__(self, k, sizes, rank, rows, dtype=torch.bfloat16):
        generator = torch.Generator(device="cuda").manual_seed(rank + k)
        self.k, self.sizes, self.rank = k, sizes, rank

        def made(*shape, scale):
            return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)

        self.a = [made(ADAPTERS, 1, rank, k, scale=k**-0.5) for _ in sizes]
        self.b = [made(ADAPTERS, 1, n, rank, scale=rank**-0.5) for n in sizes]
        self.x = made(rows, k, scale=1.0)
        self.y = made(rows, sum(sizes), scale=1.0)


class Runner:
    """One mode's add_lora_linear for rows with given slots."""

    def __init__(self, mode: str):
        from vllm.lora.ops.triton_ops import lora_expand_op, lora_shrink_op, utils

        self.mode, self.utils = mode, utils
        self.shrink, self.expand = lora_shrink_op._lora_shrink, lora_expand_op._lora_expand
        for module in (utils, lora_shrink_op):
            module.is_batch_invariant = mode == "upstream"
        utils.get_lora_op_configs.cache_clear()
        utils.load_lora_op_config.cache_clear()

    def meta(self, slots: torch.Tensor):
        from vllm.lora.ops.triton_ops import LoRAKernelMeta

        meta = LoRAKernelMeta.make(ADAPTERS, len(slots), "cuda")
        meta.prepare_tensors(slots.to("cuda", torch.int32))
        return meta

    def __call__(self, stacks: Stacks, y, x, meta):
        args = meta.meta_args(len(x), False)
        if self.mode != "bundled":
            buffer = torch.empty((len(stacks.sizes), len(x), stacks.rank), dtype=torch.float32, device="cuda")
            self.shrink(x, stacks.a, buffer, *args, 1.0)
            self.expand(buffer, stacks.b, y, *args, offset_start=0, add_inputs=True)
            return
        from bi_patch.kernels.triton import lora

        _, rows, counts, starts, ids, _, active = args
        weights, a_slot, a_rank, _ = self.utils._get_lora_a_ptr(stacks.a, x.device)
        begin, b, b_slot, _, _, sizes, same, most = self.utils._get_lora_b_ptr(stacks.b, 0, x.device)
        given = (begin, b, b_slot, sizes, same, most)
        lora.lora(
            y, x, (weights, a_slot, a_rank), given, stacks.rank, len(stacks.sizes), rows, counts, starts, ids,
            int(active.item()),
        )  # fmt: skip


def slots_of(rows: int, mixed: bool) -> torch.Tensor:
    index = torch.arange(rows)
    return (index * 5 + 3) % (ADAPTERS + 1) - 1 if mixed else torch.full((rows,), 3)


def bits(runner: Runner, stacks: Stacks) -> dict:
    """Differing elements: batches of the first M rows, and a batch whose other rows have other adapters or places."""
    rows = len(stacks.x)
    slots = slots_of(rows, True)

    def run(at):
        y = stacks.y[at].clone()
        runner(stacks, y, stacks.x[at].contiguous(), runner.meta(slots[at.cpu()]))
        return y

    def differing(got, want):
        return int((got.view(torch.int16) != want.view(torch.int16)).sum())

    whole = run(torch.arange(rows, device="cuda"))
    found = {m: differing(run(torch.arange(m, device="cuda")), whole[:m]) for m in BITS if m < rows}
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).cuda()
    found["shuffled"] = differing(run(order), whole[order])
    one = (slots == 2).nonzero().flatten().cuda()
    found["one adapter"] = differing(run(one), whole[one])
    base = (slots < 0).nonzero().flatten().cuda()
    found["touched base"] = differing(whole[base], stacks.y[base])
    for m in (1, 5, 8):
        found[f"last {m}"] = differing(run(torch.arange(rows - m, rows, device="cuda")), whole[-m:])
    again = run(torch.arange(rows, device="cuda"))
    found["again"] = differing(again, whole)
    return found


def exact(stacks: Stacks, y, slots) -> float:
    """The relative error of the result against fp64, over some rows with an adapter."""
    index = (slots >= 0).nonzero().flatten()[:16].tolist()
    error = size = 0.0
    for i in index:
        want, at = stacks.y[i].double().clone(), 0
        for a, b, n in zip(stacks.a, stacks.b, stacks.sizes):
            t = stacks.x[i].double() @ a[slots[i], 0].double().T
            want[at : at + n] += t @ b[slots[i], 0].double().T
            at += n
        error += float((y[i].double() - want).square().sum())
        size += float(want.square().sum())
    return (error / size) ** 0.5


def microseconds(runner: Runner, stacks: Stacks, rows: int, mixed: bool) -> float:
    """The least of several times of a call, replayed in a CUDA graph."""
    meta = runner.meta(slots_of(rows, mixed))
    y, x = stacks.y[:rows].clone(), stacks.x[:rows].contiguous()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            runner(stacks, y, x, meta)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            runner(stacks, y, x, meta)
    best = float("inf")
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) * 1000 / CALLS)
    return round(best, 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--rows", default=",".join(map(str, TIMED)), help="the numbers of rows that are timed")
    asked = parser.parse_args()
    timed = tuple(map(int, asked.rows.split(",")))
    import vllm

    began = time.monotonic()
    found = {
        "device": torch.cuda.get_device_name(),
        "vllm": vllm.__version__,
        "torch": str(torch.__version__),
        "date": time.strftime("%Y-%m-%d"),
        "bits": [],
        "times": [],
        "errors": [],
    }

    def keep():
        asked.out.write_text(json.dumps(found, indent=1))

    for rank, (layer, (k, sizes)) in itertools.product(RANKS, LAYERS.items()):
        stacks = Stacks(k, sizes, rank, max(TIMED))
        for mode in MODES:
            if time.monotonic() - began > asked.seconds:
                found["stopped"] = f"{layer} {rank} {mode}"
                keep()
                return
            case = {"layer": layer, "rank": rank, "mode": mode}
            try:
                runner = Runner(mode)
                if mode != "stock":
                    rows = bits(runner, stacks)
                    y, slots = stacks.y[:64].clone(), slots_of(64, True)
                    runner(stacks, y, stacks.x[:64].contiguous(), runner.meta(slots))
                    found["bits"].append({**case, "differing": rows, "error": exact(stacks, y, slots)})
                for rows, mixed in itertools.product(timed, (False, True)):
                    taken = microseconds(runner, stacks, rows, mixed)
                    found["times"].append({**case, "rows": rows, "mixed": mixed, "us": taken})
            except Exception as error:
                found["errors"].append({**case, "error": f"{type(error).__name__}: {error}"[:2000]})
            keep()
    keep()


if __name__ == "__main__":
    main()
