"""Sums of two ranks on two GPUs, without an engine: bits of each way to sum, the certificate of NCCL's sum, and times.

    PYTHONPATH=. python3 benchmarks/hopper/two_ranks.py OUT.json [--seconds 50] [--gloo]

Ways: `pieces` is vLLM's one-stage all-reduce, `one piece` the same with a buffer that holds the largest message, `nccl`
vLLM's own NCCL, `torch` PyTorch's, which stock vLLM takes where it has none, `armed` what communicator.cuda_sum does.
Stock vLLM takes `pieces` below 8 MiB, else `nccl` or `torch`. OUT.json is of rank 0, OUT.json.rank1 of rank 1; both are
written as it goes. `--gloo`: a trial on CPU with doubles of vLLM's communicators.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import peers

ROWS = 8192  # of the largest step
# As arming sets them. The processes are not armed: they take the patch point's replacement themselves.
ENVIRONMENT = peers.NO_MULTICAST | {
    "BI_PATCH": "0",
    "VLLM_BATCH_INVARIANT": "1",
    "VLLM_CUSTOM_ALLREDUCE_ALGO": "1stage",
}
FEW = (512, 256, 64, 8, 1)


def connect(rank: int, out: str, gloo: bool):
    """vLLM's communicators of this rank: the double of a CudaCommunicator, how to make a CustomAllreduce, its group."""
    import torch
    import torch.distributed as dist

    device = torch.device("cpu" if gloo else f"cuda:{rank}")
    if gloo:
        import doubles_of_two as vllm

        dist.Backend.NCCL = dist.Backend.GLOO
    else:
        from vllm.distributed.device_communicators import custom_all_reduce, pynccl

        torch.cuda.set_device(rank)
        peers.own_nccl()
        vllm = SimpleNamespace(One=custom_all_reduce.CustomAllreduce, Nccl=pynccl.PyNcclCommunicator)
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=2)
    group = dist.new_group(backend="gloo")
    make = functools.partial(vllm.One, group, device)
    held = SimpleNamespace(world_size=2, rank_in_group=rank, ca_comm=make())
    held.pynccl_comm = vllm.Nccl(group, device)
    held.device_group = group if gloo else dist.new_group(backend="nccl")
    team = SimpleNamespace(world_size=2, rank_in_group=rank, device=device, cpu_group=group, device_communicator=held)
    return held, make, team


def timed(call, calls: int) -> float:
    """Microseconds per call."""
    import torch

    if not torch.cuda.is_available():
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return round(1e6 * (time.perf_counter() - begin) / calls, 2)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return round(1000 * begin.elapsed_time(end) / calls, 2)


class Run:
    """The measurements of one rank."""

    def __init__(self, a):
        import torch
        import torch.distributed as dist

        from bi_patch.ops import bits, collectives
        from bi_patch.ops.cuda import ranks as ops
        from bi_patch.seams.cuda import adder, communicator

        self.torch, self.dist, self.bits, self.collectives, self.adder = torch, dist, bits, collectives, adder
        self.a, self.began = a, time.monotonic()
        self.width, self.rows_of_step = (64, ROWS // 8) if a.gloo else (4096, ROWS)
        self.held, self.make, self.team = connect(a.rank, a.out, a.gloo)
        self.own, self.device = self.held.ca_comm, self.team.device
        self.carrier = communicator.carrier(self.held)
        self.pieces = lambda x: ops.all_reduce(x, self.own, self.carrier)
        self.summed = communicator._sum(None)
        by_torch = adder._by_torch(self.held)
        armed = lambda x: self.summed(self.held, x)  # noqa: E731
        self.ways = {"pieces": self.pieces, "nccl": self.held.pynccl_comm.all_reduce, "torch": by_torch, "armed": armed}
        self.found = {"buffer": self.own.max_size, "connected_s": round(time.monotonic() - self.began, 2)}
        if not a.gloo:
            import stamp

            self.found = stamp.head() | {"nccl": self.held.pynccl_comm.nccl_version} | self.found
        self.rows: list[dict] = []
        self.found["rows"] = self.rows

    def save(self, stage: str) -> None:
        self.found[f"{stage}_s"] = round(time.monotonic() - self.began, 2)
        Path(f"{self.a.out}.rank1" if self.a.rank else self.a.out).write_text(json.dumps(self.found))
        if not self.a.rank:
            print(stage, self.found[f"{stage}_s"], flush=True)

    def late(self, share: float) -> bool:
        """Whether a rank has used this share of its seconds. Both ranks get the same answer."""
        flag = self.torch.tensor([time.time() - self.a.started > self.a.seconds * share], dtype=self.torch.int32)
        self.dist.all_reduce(flag, group=self.team.cpu_group)
        return bool(flag.item())

    def config(self, dtype):
        steps = SimpleNamespace(max_num_batched_tokens=self.rows_of_step * 2 // dtype.itemsize)
        model = SimpleNamespace(get_hidden_size=lambda: self.width, dtype=dtype)
        return SimpleNamespace(model_config=model, scheduler_config=steps, parallel_config=None)

    def certify(self, dtype) -> dict:
        """As a worker does at its start: the certificate, then the check of the order, through the patch point."""
        config, began = self.config(dtype), time.monotonic()
        self.held.__dict__.pop(self.adder._ADDER, None)
        self.adder.certify(config, self.team, lambda: self.carrier)
        made, took = self.adder.adder(self.held), time.monotonic() - began
        moved = self.collectives.moved(
            self.ways["armed"],
            rank=self.a.rank,
            ranks=2,
            width=self.width,
            most=config.scheduler_config.max_num_batched_tokens,
            dtype=dtype,
            device=self.device,
            ordered=True,
        )
        lengths = self.adder._lengths(config, self.own.max_size)[dtype]
        passed = None if made is None else made.most[dtype]
        return {"certified": passed, "elements": lengths, "moved": moved, "seconds": round(took, 3)}

    def compare(self, dtype) -> None:
        """Bits of messages of one element up to the largest, beside the sum in rank order and beside the pieces."""
        torch, largest = self.torch, self.width * self.config(dtype).scheduler_config.max_num_batched_tokens
        piece, name = self.own.max_size // dtype.itemsize, str(dtype).removeprefix("torch.")
        sizes = {n for k in range(largest.bit_length()) for n in ((1 << k) - 1, 1 << k, (1 << k) + 1)}
        sizes |= {piece - 1, piece, piece + 1, piece + 8, 3 * piece // 2 + 3, largest - 1, largest}
        for n in sorted(n for n in sizes if 0 < n <= largest):
            if self.late(0.75):
                self.found["cut"] = "bits"
                return
            parts = torch.stack([self.collectives._random_bits(n, r + 2 * (n % 7), dtype, self.device) for r in (0, 1)])
            ends = self.collectives._special(dtype).to(self.device)[:, :n]
            parts[:, : ends.shape[1]] = ends
            want = self.collectives.in_rank_order(parts)
            real = ~want.isnan()  # PyTorch's own NaN may have other bits than those of a collective
            got = {way: call(parts[self.a.rank].clone()) for way, call in self.ways.items()}
            if self.a.gloo:
                got["torch"] = torch.where(real, got["torch"], float("nan"))
            row = {"dtype": name, "elements": n, "nan": n - int(real.sum())}
            row["rank order"] = {way: self.bits.differing(total[real], want[real]) for way, total in got.items()}
            row["pieces"] = {way: self.bits.differing(total, got["pieces"]) for way, total in got.items()}
            self.rows.append(row)

    def time(self, ways: dict, rows: list[int], rounds: int) -> None:
        """Microseconds of each way, in turns."""
        for count in rows:
            if self.late(0.93):
                self.found["cut"] = "times"
                return
            x = self.torch.randn(count, self.width, device=self.device).to(self.torch.bfloat16)
            row: dict = {"rows": count, "bytes": x.nbytes, "us": {way: [] for way in ways}}
            for call in ways.values():
                timed(functools.partial(call, x), 3)
            for _ in range(rounds):
                for way, call in ways.items():
                    row["us"][way].append(timed(functools.partial(call, x), 2 if self.a.gloo else 20))
            self.rows.append(row)

    def graphs(self, rows: list[int]) -> None:
        """Microseconds in CUDA graphs, where the one-stage all-reduce copies nothing."""
        torch = self.torch
        for count in rows:
            x = torch.randn(count, self.width, device=self.device).to(torch.bfloat16)
            row: dict = {"rows": count, "bytes": x.nbytes, "graph_us": {}}
            for way, call in self.ways.items():
                if way == "torch":
                    continue
                graph = torch.cuda.CUDAGraph()
                with self.own.capture(), torch.cuda.graph(graph, stream=torch.cuda.Stream()):
                    for _ in range(5):
                        call(x)
                timed(graph.replay, 2)
                row["graph_us"][way] = [round(timed(graph.replay, 4) / 5, 2) for _ in range(3)]
            self.rows.append(row)

    def gathered(self, x):
        from bi_patch.kernels.triton.ranks import rank_sum

        parts = self.torch.empty((2, x.numel()), dtype=x.dtype, device=x.device)
        self.held.pynccl_comm.all_gather(parts, x.reshape(-1))
        return rank_sum(parts).view(x.shape)

    def all(self) -> None:
        torch, step = self.torch, self.rows_of_step
        self.save("connected")
        self.found["certificates"] = {}
        for dtype in (torch.float32, torch.float16, torch.bfloat16):  # that of bf16 then serves
            self.found["certificates"][str(dtype).removeprefix("torch.")] = self.certify(dtype)
            self.compare(dtype)
            self.save(str(dtype).removeprefix("torch."))
        from bi_patch.ops.cuda.ranks import all_reduce

        large = self.make(max_size=self.width * step * 2)
        more = [step, step // 2, step // 4, step // 8, step // 8 + 1, 3 * step // 16, 3 * step // 8, 3 * step // 4]
        self.time(self.ways | {"one piece": lambda x: all_reduce(x, large, self.carrier)}, [*more, *FEW], 5)
        self.save("times")
        if not self.a.gloo and not self.late(0.8):
            two_shot = lambda x: all_reduce(x, None, self.carrier)  # noqa: E731
            self.time({"gather and sum": self.gathered, "two-shot": two_shot}, more[:5], 3)
            self.save("gathers")
        if not self.a.gloo and not self.late(0.85):
            self.graphs([step // 4, step // 8 + 1, step])
        self.save("end")

    def told(self) -> None:
        compared = [row for row in self.rows if "elements" in row]
        other = [row for row in compared if any((*row["rank order"].values(), *row["pieces"].values()))]
        print(self.found["certificates"])
        print(len(compared), "messages,", sum(r["elements"] for r in compared), "elements; with other bits:", other[:4])
        for row in self.rows:
            if times := row.get("us", row.get("graph_us")):
                print(row["bytes"], "graph" * ("us" not in row), {w: sorted(t)[len(t) // 2] for w, t in times.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--seconds", type=float, default=50, help="from the start of the command on")
    parser.add_argument("--gloo", action="store_true")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.rank is None:
        Path(f"{a.out}.store").unlink(missing_ok=True)
        command = [sys.executable, *sys.argv, "--started", str(time.time()), "--rank"]
        ranks = [subprocess.Popen([*command, str(rank)], env=os.environ | ENVIRONMENT) for rank in (0, 1)]
        while None in (codes := [rank.poll() for rank in ranks]):
            if any(codes):
                for rank in ranks:
                    rank.kill()  # the other one would wait
            time.sleep(0.1)
        Path(f"{a.out}.store").unlink(missing_ok=True)
        sys.exit(any(codes))
    import bi_patch_entry

    bi_patch_entry.without_arming()
    run = Run(a)
    run.all()
    if not a.rank:
        run.told()
    run.dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # NCCL's threads end with the process


if __name__ == "__main__":
    main()
