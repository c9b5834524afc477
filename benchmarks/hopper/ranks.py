"""Measures collectives of two or more GPUs: bits against a sum in rank order, and times, in graphs and without.

    PYTHONPATH=. python3 benchmarks/hopper/ranks.py OUT.json [--mode stock|pinned|free|armed] [--ranks 2] [--seconds 40]

Modes: stock vLLM; upstream's batch-invariant mode, which pins NCCL to one channel; that mode without the pins; armed
vLLM. Each mode needs a process of its own, because NCCL and vLLM read their variables once. The result has one row for
each collective and message: microseconds per call, and the elements that differ from the sum in rank order, in fp32
and rounded once.
"""

import argparse
import json
import os
import sys
import time

WIDTHS = (2048, 4096)
ROWS = (1, 2, 8, 16, 64, 65, 256, 512, 1024, 1025, 2048, 4096, 8192)
ODD = ((1, 2052), (3, 2052), (7, 1001), (64, 1001), (1024, 2049))
HEADS = (1, 8, 64, 256)  # rows of logits, gathered over ranks
VOCABULARY = 151936


def environment(mode: str) -> None:
    from peers import NO_MULTICAST

    os.environ |= NO_MULTICAST | {"BI_PATCH": "1" if mode == "armed" else "0"}
    if mode != "stock":
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    if mode == "armed":
        import bi_patch

        bi_patch.arm()


def connect(rank: int, ranks: int, mode: str, port: int):
    """The group of ranks, as vLLM makes it."""
    import torch

    torch.cuda.set_device(rank)
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.determinism import batch_invariant

    if mode == "free":
        batch_invariant.pin_nccl_env = lambda pins: None
    batch_invariant.init_batch_invariance()
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank, "nccl")
        parallel_state.initialize_model_parallel(ranks, 1)
    return parallel_state.get_tp_group()


def timed(call, graph=None, repeats: int = 20) -> float:
    """Microseconds per call: the median of three series, each between two events."""
    import torch

    run = graph.replay if graph is not None else call
    for _ in range(3):
        run()
    found = []
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        found.append(1000 * begin.elapsed_time(end) / repeats)
    return sorted(found)[1]


def captured(group, call, calls: int = 10):
    """A graph of `calls` calls."""
    import torch
    from vllm.distributed.parallel_state import graph_capture

    with graph_capture(group.device) as context:
        with torch.cuda.stream(context.stream):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=context.stream):
            for _ in range(calls):
                call()
    return graph


def worker(rank: int, ranks: int, a, port: int) -> None:
    environment(a.mode)
    started = time.monotonic()
    import torch

    group = connect(rank, ranks, a.mode, port)
    held, connected = group.device_communicator, time.monotonic()
    import torch.distributed as dist

    from bi_patch.kernels.triton.ranks import rank_sum

    rows: list = []
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "mode": a.mode,
        "ranks": ranks,
        "started_s": round(time.monotonic() - started, 1),
        "pins": {k: v for k, v in os.environ.items() if k.startswith("NCCL_")},
        "rows": rows,
    }
    symmetric = getattr(held, "symm_mem_comm", None)
    own = getattr(held, "ca_comm", None)

    def serves(x) -> str:
        if own is not None and not own.disabled and own.should_custom_ar(x):
            return "custom"
        if symmetric is not None and symmetric.should_use_symm_mem(x):
            return "symmetric"
        return "nccl"

    def wanted(x):
        parts = torch.empty((ranks, *x.shape), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(parts.view(ranks * x.shape[0], *x.shape[1:]), x, group=group.device_group)
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()
        return total.to(x.dtype)

    def gathered(x):
        parts = torch.empty((ranks, x.numel()), dtype=x.dtype, device=x.device)
        held.pynccl_comm.all_gather(parts, x.reshape(-1))
        total = parts[0].float()
        for part in parts[1:]:
            total += part.float()
        return total.to(x.dtype).view_as(x)

    def two_shot(x):
        """Each rank gets its slice of all parts, adds it in rank order, and the slices are gathered."""
        flat, size = x.reshape(-1), x.numel() // ranks
        if size * ranks != x.numel():
            raise ValueError("no equal slices")
        parts = torch.empty((ranks, size), dtype=x.dtype, device=x.device)
        parts[rank].copy_(flat[rank * size : (rank + 1) * size])
        comm = held.pynccl_comm
        comm.group_start()
        for other in range(ranks):
            if other != rank:
                comm.send(flat[other * size : (other + 1) * size], other)
                comm.recv(parts[other], other)
        comm.group_end()
        out = torch.empty_like(flat)
        own_slice = out[rank * size : (rank + 1) * size]
        own_slice.copy_(rank_sum(parts))
        comm.all_gather(out, own_slice)
        return out.view_as(x)

    def gathered_by_kernel(x):
        parts = torch.empty((ranks, x.numel()), dtype=x.dtype, device=x.device)
        held.pynccl_comm.all_gather(parts, x.reshape(-1))
        return rank_sum(parts).view_as(x)

    calls = {"two-shot": two_shot, "gather and the bundled sum": gathered_by_kernel}
    calls |= {"all_reduce": held.all_reduce, "nccl": held.pynccl_comm.all_reduce, "gather and sum": gathered}
    if symmetric is not None and not symmetric.disabled:
        calls["symmetric"] = symmetric.all_reduce
    torch.manual_seed(1234 + rank)
    shapes = [(n, w) for w in WIDTHS for n in ROWS] + list(ODD)
    shapes.sort(key=lambda s: (s[0] not in (1, 64, 1024, 8192), s[0] * s[1]))

    def over() -> bool:
        flag = torch.tensor([time.monotonic() - connected > a.seconds], device="cuda", dtype=torch.int32)
        dist.all_reduce(flag, group=group.device_group)
        return bool(flag.item())

    def save():
        if rank == 0:
            with open(a.out, "w") as file:
                json.dump(result, file)

    def one(name, call, x, compare: bool) -> None:
        row = {"call": name, "shape": list(x.shape), "bytes": x.numel() * x.element_size(), "serves": serves(x)}
        try:
            if compare:
                got, want = call(x), wanted(x)
                row["compared"] = got.numel()
                row["differing"] = int((got.view(torch.int16) != want.view(torch.int16)).sum())
            row["eager_us"] = round(timed(lambda: call(x)), 2)
            graph = captured(group, lambda: call(x))
            row["graph_us"] = round(timed(None, graph, 5) / 10, 2)
            del graph
        except Exception as error:  # a collective that refuses a message says so in its row
            row["error"] = f"{type(error).__name__}: {error}"[:200]
        rows.append(row)

    for rows_of, width in shapes:
        if over():
            result["cut"] = True
            break
        x = torch.randn(rows_of, width, device="cuda").to(torch.bfloat16)
        for name, call in calls.items():
            if a.only and name not in a.only.split(","):
                continue
            if name == "symmetric" and not symmetric.should_use_symm_mem(x):
                continue
            one(name, call, x, True)
        save()
    for rows_of in HEADS:
        if over():
            break
        x = torch.randn(rows_of, VOCABULARY // ranks, device="cuda").to(torch.bfloat16)
        one("all_gather", held.all_gather, x, False)
        if hasattr(held, "custom_all_gather") and held.custom_all_gather(x) is not None:
            one("custom_all_gather", held.custom_all_gather, x, False)
        save()
    save()
    if rank == 0:
        print("done", a.mode, len(rows), round(time.monotonic() - started, 1), flush=True)
    sys.stdout.flush()
    dist.barrier(group=group.cpu_group)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--mode", choices=("stock", "pinned", "free", "armed"), default="stock")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--only", help="comma-separated collectives, e.g. all_reduce")
    a = parser.parse_args()
    import torch.multiprocessing as mp

    mp.spawn(worker, args=(a.ranks, a, 20000 + os.getpid() % 20000), nprocs=a.ranks)


if __name__ == "__main__":
    main()
