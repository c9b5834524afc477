"""Row-parallel products in eight leaves of K: bits for 1, 2, 4 and 8 ranks, computed one by one, and times.

    PYTHONPATH=. python3 benchmarks/hopper/leaves.py OUT.json [--seconds 20] [--go FILE]

Each row of the result: a shape and a number of rows; outputs that differ between numbers of ranks, between forms of the
kernels and between a row alone and in the batch; the largest error against fp64 beside that of PyTorch's product;
microseconds of each form in a graph, for 1 rank and for one of 2, and of PyTorch's product. The form that serves comes
first. Calls take turns over copies of the weight, which L2 does not hold together.
--go: bits are compared at once, and times taken once FILE exists. "sums": the bundled sum over 1 to 8 ranks, against
the sum in rank order, bit by bit.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ["BI_PATCH"] = "0"

SHAPES = {"Qwen3-8B o_proj": (4096, 4096), "Qwen3-8B down_proj": (4096, 12288)}
ROWS = (1, 8, 16, 64, 256, 8192, 32, 128, 2048)
# Further forms, by numbers of rows: groups of leaves (0: by pairs), tensor descriptors, tile.
FORMS = (
    ((1, 8, 16), (1, False, 16, 64, 128, 4, 5)),
    ((1, 8, 16), (1, False, 16, 32, 128, 2, 5)),
    ((32,), (2, False, 32, 64, 128, 4, 4)),
    ((64, 128), (2, True, 64, 64, 128, 4, 4)),
    ((128, 256), (0, True, 64, 64, 128, 8, 3)),
    ((128,), (0, True, 64, 64, 64, 8, 5)),
    ((256,), (0, True, 64, 128, 64, 8, 4)),
    ((256,), (0, True, 128, 64, 64, 4, 4)),
    ((256,), (0, True, 128, 64, 32, 8, 8)),
    ((256,), (0, True, 128, 128, 64, 8, 3)),
    ((2048, 8192), (0, True, 128, 64, 64, 8, 4)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--seconds", type=float, default=20, help="of times")
    parser.add_argument("--go")
    a = parser.parse_args()
    import stamp
    import torch

    from bi_patch.kernels.triton import leaves

    torch.manual_seed(1)
    rows: list = []
    result = stamp.head() | {"command": "benchmarks/hopper/leaves.py", "rows": rows}

    def differing(one, other) -> int:
        return int((one.view(torch.int16) != other.view(torch.int16)).sum())

    def timed(call, weights) -> float:
        for weight in weights[:1]:
            call(weight)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(8):
                call(weights[i % len(weights)])
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

    def call(form: leaves.Form, x, leaf_count: int, dtype):
        return lambda w: leaves.product(x, w, None, leaf_count, dtype, form)

    held = {}
    for name, (n, k) in SHAPES.items():
        copies = [(torch.randn(n, k, device="cuda") * k**-0.5).bfloat16() for _ in range(4)]
        held[name] = copies, [w[:, : k // 2].contiguous() for w in copies]
        w = copies[0]
        for m in ROWS:
            x = torch.randn(m, k, device="cuda").bfloat16()
            if a.go and os.path.exists(a.go):  # times are short of the GPU, bits are not
                result["bits cut"] = True
                break
            row = {"shape": name, "rows": m}
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
            row["tiles: differing, us of 1 rank, us of one of 2"] = tiles = {}
            for form in of_rows(m, n, k):
                try:
                    tiles[str(form)] = [differing(call(form, x, 8, torch.bfloat16)(w), want)]
                    half = x[:, : k // 2].contiguous()
                    call(form, half, 4, torch.float32)(held[name][1][0])
                except Exception as error:
                    tiles[str(form)] = f"{type(error).__name__}: {error}"[:120]
            rows.append(row)
            write(a.out, result)
    print("bits compared", flush=True)
    if a.go:
        Path(f"{a.go}.leaves").touch()
        while not os.path.exists(a.go):
            time.sleep(0.1)
    begin = time.monotonic()
    for row in sorted(rows, key=lambda row: ROWS.index(row["rows"])):
        (copies, halves), k, m = held[row["shape"]], SHAPES[row["shape"]][1], row["rows"]
        x = torch.randn(m, k, device="cuda").bfloat16()
        half = x[:, : k // 2].contiguous()
        if time.monotonic() - begin > a.seconds:
            result["cut"] = True
            break
        row["torch_us"] = timed(lambda w, x=x: torch.mm(x, w.T), copies)
        row["torch_half_us"] = timed(lambda w, x=half: torch.mm(x, w.T), halves)
        for form in of_rows(m, *SHAPES[row["shape"]]):
            found = row["tiles: differing, us of 1 rank, us of one of 2"][str(form)]
            if isinstance(found, list):
                found.append(timed(call(form, x, 8, torch.bfloat16), copies))
                found.append(timed(call(form, half, 4, torch.float32), halves))
        write(a.out, result)
    print("done", len(rows), round(time.monotonic() - begin, 1))


def of_rows(rows: int, cols: int, depth: int) -> list:
    """The form that serves, then further ones."""
    import torch

    from bi_patch.kernels.triton import gemm, leaves

    processors = torch.cuda.get_device_properties(0).multi_processor_count
    further = [leaves.Form(*form[:2], gemm.Tile(*form[2:])) for held, form in FORMS if rows in held]
    return [leaves.form(rows, cols, depth // 8, 8, processors), *further]


def write(out: str, result: dict) -> None:
    with open(out, "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
