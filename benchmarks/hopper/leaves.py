"""Row-parallel products in eight leaves of K: bits for 1, 2, 4 and 8 ranks, computed one by one, and times.

    PYTHONPATH=. python3 benchmarks/hopper/leaves.py OUT.json [--seconds 20]

Each row of the result: a shape and a number of rows; outputs that differ between numbers of ranks, between forms (each
leaf by programs of its own, or all leaves of a tile by one) and between a row alone and in the batch; the largest error
against fp64 beside that of PyTorch's product; microseconds of each form in a graph, for 1 rank and for one of 2, and of
PyTorch's product. "sums": the bundled sum over 1 to 8 ranks, against the sum in rank order, bit by bit.
"""

import argparse
import functools
import json
import os
import time

os.environ["BI_PATCH"] = "0"

SHAPES = {"Qwen3-8B o_proj": (4096, 4096), "Qwen3-8B down_proj": (4096, 12288), "Qwen3-1.7B down_proj": (2048, 6144)}
ROWS = (1, 8, 64, 256, 2048, 8192)
TILES = ((64, 128, 64, 4, 3), (64, 128, 64, 8, 3), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 64, 64, 4, 4))
FEW = (
    (16, 32, 64, 4, 5),
    (16, 64, 64, 4, 5),
    (16, 64, 128, 4, 4),
    (32, 64, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 128, 64, 8, 3),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--seconds", type=float, default=20)
    a = parser.parse_args()
    begin = time.monotonic()
    import torch

    from bi_patch.kernels.triton import gemm, leaves

    torch.manual_seed(1)
    rows: list = []
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}

    def differing(one, other) -> int:
        return int((one.view(torch.int16) != other.view(torch.int16)).sum())

    def timed(call) -> float:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(8):
                call()
        graph.replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        best = float("inf")
        for _ in range(3):
            torch.cuda.synchronize()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end))
        return round(1000 * best / 8, 2)

    from bi_patch.kernels.triton.ranks import rank_sum
    from bi_patch.ops.collectives import in_rank_order

    sums = {"compared": 0, "differing": 0}
    for ranks in range(1, 9):
        for size in (1, 7, 8, 1001, 4096, 4097, 262144, 2099201):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                parts = torch.randn(ranks, size, device="cuda").to(dtype)
                sums["compared"] += size
                sums["differing"] += int((rank_sum(parts) != in_rank_order(parts)).sum())
    result["sums"] = sums

    for name, (n, k) in SHAPES.items():
        w = (torch.randn(n, k, device="cuda") * k**-0.5).bfloat16()
        for m in ROWS:
            if time.monotonic() - begin > a.seconds:
                result["cut"] = True
                break
            x = torch.randn(m, k, device="cuda").bfloat16()
            row = {"shape": name, "rows": m}
            try:
                want = leaves.product(x, w, None, 8, torch.bfloat16)
                if m <= 256 or name.endswith("o_proj"):
                    for ranks in (2, 4, 8):
                        own = k // ranks
                        cut = [slice(r * own, (r + 1) * own) for r in range(ranks)]
                        roots = [leaves.product(x[:, c], w[:, c], None, 8 // ranks, torch.float32) for c in cut]
                        got = leaves.tree(torch.stack(roots), None, torch.bfloat16)
                        row[f"differing {ranks} ranks"] = differing(got, want)
                row["differing alone"] = differing(leaves.product(x[:1], w, None, 8, torch.bfloat16), want[:1])
                row["compared"] = want.numel()
                exact = x[:256].double() @ w.double().T
                for key, got in (("error", want), ("torch_error", torch.mm(x, w.T))):
                    row[key] = float((got[:256].double() - exact).abs().max() / exact.std())
                row["torch_us"] = timed(functools.partial(torch.mm, x, w.T))
                half, half_w = x[:, : k // 2].contiguous(), w[:, : k // 2].contiguous()
                row["torch_half_us"] = timed(functools.partial(torch.mm, half, half_w.T))
                tiles = {}
                for each, chosen in ((True, FEW), (False, TILES)):
                    if each and m > 256 or not each and m < 64:
                        continue
                    for blocks in chosen:
                        if each and blocks[0] > max(16, m):
                            continue
                        tile = gemm.Tile(*blocks)
                        key = f"{'each' if each else 'whole'} {blocks}"
                        try:
                            whole = functools.partial(leaves.product, x, w, None, 8, torch.bfloat16, each, tile)
                            part = functools.partial(leaves.product, half, half_w, None, 4, torch.float32, each, tile)
                            bad, us, two = differing(whole(), want), timed(whole), timed(part)
                            tiles[key] = [bad, us, two]
                        except Exception as error:
                            tiles[key] = f"{type(error).__name__}: {error}"[:80]
                row["tiles: differing, us of 1 rank, us of one of 2"] = tiles
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            rows.append(row)
            with open(a.out, "w") as file:
                json.dump(result, file)
    with open(a.out, "w") as file:
        json.dump(result, file)
    print("done", len(rows), round(time.monotonic() - begin, 1))


if __name__ == "__main__":
    main()
