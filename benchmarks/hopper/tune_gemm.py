"""Times every tile of the bundled GEMM, and the library's GEMM, by shape and number of rows on the current GPU.

    PYTHONPATH=. python3 benchmarks/hopper/tune_gemm.py OUT.json [--rows 1,8,16]

The costs in kernels/triton/gemm.py come from this script's output. The script first compares every tile bitwise with
the reference tile. One process per core, at most 16, compiles kernels. Then one process times them as gemm.py does.
"""

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

os.environ["BI_PATCH"] = "0"
import stamp
from gemm import mask_split_k, problems, time_calls

ROWS = (1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 8192)
# Tiles: block m, n, k, warps, stages, programs per multiprocessor (0: the kernel that loads through pointers).
FEW = (
    (16, 32, 256, 2, 5, 0),
    (16, 64, 256, 4, 5, 0),
    (16, 128, 128, 4, 4, 0),
    (32, 32, 256, 4, 4, 0),
    (32, 128, 128, 4, 4, 0),
    (16, 16, 256, 2, 6, 0),
    (16, 16, 256, 1, 6, 0),
    (16, 16, 512, 2, 4, 0),
    (16, 32, 512, 4, 4, 0),
    (16, 32, 128, 2, 8, 0),
)
SOME = (
    (64, 32, 128, 4, 5, 0),
    (64, 128, 64, 4, 5, 0),
    (64, 64, 128, 4, 4, 0),
    (128, 64, 64, 4, 4, 0),
    (64, 32, 128, 4, 6, 1),
    (64, 64, 128, 4, 6, 1),
    (64, 64, 128, 4, 3, 2),
    (64, 128, 64, 4, 7, 1),
    (64, 128, 64, 4, 4, 2),
    (64, 128, 128, 4, 4, 1),
    (64, 256, 64, 4, 5, 1),
    (64, 256, 64, 8, 5, 1),
    (128, 32, 128, 4, 5, 1),
    (128, 64, 64, 4, 7, 1),
    (128, 64, 64, 4, 4, 2),
    (128, 64, 64, 8, 7, 1),
    (128, 64, 128, 4, 4, 1),
    (128, 64, 128, 8, 4, 1),
    (128, 128, 64, 8, 3, 1),
    (128, 128, 64, 8, 4, 1),
    (128, 128, 64, 8, 6, 1),
    (128, 128, 64, 4, 5, 1),
    (128, 128, 64, 4, 3, 2),
    (128, 128, 128, 8, 3, 1),
    (256, 64, 64, 8, 5, 1),
    (256, 64, 128, 8, 2, 1),
    (256, 128, 64, 8, 4, 1),
    (128, 256, 64, 8, 3, 1),
    (128, 256, 64, 8, 4, 1),
)


def tiles(rows: int) -> tuple:
    return FEW if rows <= 32 else SOME if rows <= 1024 else tuple(t for t in SOME if t[0] * t[1] >= 128 * 128)


def compile_tile(tile: tuple) -> tuple[tuple, str]:
    """Compile one tile into Triton's cache and compare its bits with the reference tile's.

    Returns the tile and what is wrong; "" if nothing is.
    """
    import torch

    from bi_patch.kernels.triton import gemm
    from bi_patch.ops import bits

    torch.manual_seed(0)
    x, weight = (torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16) for m in (300, 1024))
    try:
        got = gemm.gemm(x, weight, None, gemm.Tile(*tile))
    except Exception as error:  # for example, the tile needs too much shared memory
        return tile, f"{type(error).__name__}: {str(error)[:120]}"
    return tile, "other bits" if bits.differing(got, gemm.gemm(x, weight, None, gemm.REFERENCE)) else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--seconds", type=float, default=90, help="start no further measurement after this time")
    parser.add_argument("--rows", type=lambda text: tuple(map(int, text.split(","))), default=ROWS)
    a = parser.parse_args()
    began = time.monotonic()
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        wrong = dict(pool.map(compile_tile, sorted({tile for m in a.rows for tile in tiles(m)})))
    print(f"compiled in {time.monotonic() - began:.0f} s", {t: w for t, w in wrong.items() if w}, flush=True)

    import torch

    from bi_patch.kernels.triton import gemm

    mask_split_k(torch)
    head, rows = stamp.head(), []
    for name, n, k, x, weights in problems(torch, a.rows):
        if time.monotonic() - began > a.seconds:
            break
        row = {"shape": name, "n": n, "k": k, "m": len(x), "tiles": []}
        row["library_us"] = time_calls([lambda x=x, w=w: torch.nn.functional.linear(x, w) for w in weights])
        for tile in tiles(len(x)):
            if not wrong[tile]:
                t = gemm.Tile(*tile)
                us = time_calls([lambda x=x, w=w, t=t: gemm.gemm(x, w, None, t) for w in weights])
                row["tiles"].append((us, tile))
        row["tiles"].sort()
        rows.append(row)
        best, tile = row["tiles"][0]
        print(f"{name} M={len(x)} library {row['library_us']:.1f} best {best:.1f} us {tile}", flush=True)
        with open(a.out, "w") as file:
            json.dump({**head, "rows": rows}, file)


if __name__ == "__main__":
    main()
