"""Times every tile of the bundled GEMM by shape and number of rows on this GPU, and the library's GEMM beside them.

    PYTHONPATH=. python3 benchmarks/hopper/tune_gemm.py OUT.json [--rows 1,8,16]

The costs in kernels/triton/gemm.py are read off its output. Every tile is first compared bitwise with the reference
tile. Kernels are compiled by as many processes as the machine has cores, then timed by one; times as in gemm.py.
"""

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

os.environ["BI_PATCH"] = "0"
from gemm import CACHE_BYTES, SHAPES, time_calls

ROWS = (1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 8192)
# Block m, n, k, warps, stages; programs a multiprocessor (0: through pointers). The rows that a tile is tried for.
FEW = (
    (16, 32, 256, 2, 5, 0), (16, 64, 256, 4, 5, 0), (16, 128, 128, 4, 4, 0), (32, 32, 256, 4, 4, 0),
    (32, 128, 128, 4, 4, 0),
)  # fmt: skip
SOME = (
    (64, 32, 128, 4, 5, 0), (64, 128, 64, 4, 5, 0), (64, 64, 128, 4, 4, 0), (128, 64, 64, 4, 4, 0),
    (64, 32, 128, 4, 6, 1), (64, 64, 128, 4, 6, 1), (64, 64, 128, 4, 3, 2), (64, 128, 64, 4, 7, 1),
    (64, 128, 64, 4, 4, 2), (64, 128, 128, 4, 4, 1), (64, 256, 64, 4, 5, 1), (64, 256, 64, 8, 5, 1),
    (128, 32, 128, 4, 5, 1), (128, 64, 64, 4, 7, 1), (128, 64, 64, 4, 4, 2), (128, 64, 64, 8, 7, 1),
    (128, 64, 128, 4, 4, 1), (128, 64, 128, 8, 4, 1), (128, 128, 64, 8, 3, 1), (128, 128, 64, 8, 4, 1),
    (128, 128, 64, 8, 6, 1), (128, 128, 64, 4, 5, 1), (128, 128, 64, 4, 3, 2), (128, 128, 128, 8, 3, 1),
    (256, 64, 64, 8, 5, 1), (256, 64, 128, 8, 2, 1), (256, 128, 64, 8, 4, 1), (128, 256, 64, 8, 3, 1),
    (128, 256, 64, 8, 4, 1),
)  # fmt: skip


def tiles(rows: int) -> tuple:
    return FEW if rows <= 32 else SOME if rows <= 1024 else tuple(t for t in SOME if t[0] * t[1] >= 128 * 128)


def _data(torch, n: int, k: int, m: int):
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
    return torch.randn(m, k, device="cuda", dtype=torch.bfloat16), weight


def compile_tile(tile: tuple) -> tuple[tuple, str]:
    """Compile one tile into Triton's cache and compare its bits with the reference tile's. Returns what is wrong."""
    import torch

    from bi_patch.kernels.triton import gemm

    torch.manual_seed(0)
    x, weight = _data(torch, 1024, 2048, 300)
    try:
        got = gemm.gemm(x, weight, None, gemm.Tile(*tile))
    except Exception as error:  # too much shared memory, for one
        return tile, f"{type(error).__name__}: {str(error)[:120]}"
    want = gemm.gemm(x, weight, None, gemm.REFERENCE)
    return tile, "" if torch.equal(got.view(torch.int16), want.view(torch.int16)) else "other bits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--seconds", type=float, default=90, help="no shape is begun later than this")
    parser.add_argument("--rows", type=lambda text: tuple(map(int, text.split(","))), default=ROWS)
    a = parser.parse_args()
    began = time.monotonic()
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        wrong = dict(pool.map(compile_tile, sorted({tile for m in a.rows for tile in tiles(m)})))
    print(f"compiled in {time.monotonic() - began:.0f} s", {t: w for t, w in wrong.items() if w}, flush=True)

    import torch

    from bi_patch.kernels.triton import gemm

    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
    rows = []
    for name, (n, k) in SHAPES.items():
        if time.monotonic() - began > a.seconds:
            break
        copies = max(1, CACHE_BYTES // (n * k * 2))
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5 for _ in range(copies)]
        for m in a.rows:
            if n > 100000 and m > 512:
                continue
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            calls = weights * max(1, 12 // copies) if m <= 512 else weights
            row = {"shape": name, "n": n, "k": k, "m": m, "tiles": []}
            row["library_us"] = time_calls(torch, [lambda x=x, w=w: torch.nn.functional.linear(x, w) for w in calls])
            for tile in tiles(m):
                if not wrong[tile]:
                    t = gemm.Tile(*tile)
                    us = time_calls(torch, [lambda x=x, w=w, t=t: gemm.gemm(x, w, None, t) for w in calls])
                    row["tiles"].append((us, tile))
            row["tiles"].sort()
            rows.append(row)
            best, tile = row["tiles"][0]
            print(f"{name} M={m} library {row['library_us']:.1f} best {best:.1f} us {tile}", flush=True)
        with open(a.out, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, file)


if __name__ == "__main__":
    main()
