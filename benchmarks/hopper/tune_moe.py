"""Finds the fastest tile of the Triton experts for each number of tokens on the current GPU, and writes a table.

    PYTHONPATH=. python3 benchmarks/hopper/tune_moe.py EXPERTS N HIDDEN TOP_K OUT_FOLDER

The script first compares every tile bitwise with the fixed tile and skips a tile that differs. It times a CUDA graph of
calls.
"""

import functools
import json
import os
import sys

os.environ["BI_PATCH"] = "0"
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096)
# Tiles: block m, n, k, group, warps, stages.
TILES = (
    (16, 64, 64, 1, 4, 4),
    (16, 64, 128, 1, 4, 4),
    (16, 128, 64, 1, 4, 4),
    (16, 128, 128, 1, 4, 3),
    (16, 32, 256, 1, 4, 3),
    (16, 64, 256, 1, 4, 3),
    (32, 64, 128, 1, 4, 4),
    (32, 128, 64, 1, 4, 4),
    (64, 128, 64, 1, 4, 4),
    (64, 128, 64, 16, 8, 4),
    (64, 256, 64, 16, 8, 3),
    (128, 128, 64, 16, 8, 4),
    (128, 256, 64, 16, 8, 3),
)


def as_config(tile) -> dict:
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
    return dict(zip(names, tile, strict=True)) | {"SPLIT_K": 1}


def main() -> None:
    experts, n, hidden, top_k = map(int, sys.argv[1:5])
    import torch
    from gemm import time_calls
    from vllm.model_executor.layers.fused_moe import override_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts, get_default_config

    from bi_patch.ops import bits
    from bi_patch.ops.cuda import moe

    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5  # noqa: E731
    w13, w2 = make(experts, 2 * n, hidden), make(experts, hidden, n)
    table, lines = {}, []
    for m in ROWS:
        x = torch.randn(m, hidden, device="cuda", dtype=torch.bfloat16)
        weights, ids = torch.topk(torch.randn(m, experts, device="cuda").softmax(-1), top_k, dim=-1)
        ids = ids.to(torch.int32)
        call = functools.partial(fused_experts, x, w13, w2, weights, ids)
        with override_config(moe.FIXED):
            want = call()
            fixed = time_calls([call] * 6)
        stock_tile = get_default_config(m, experts, n, hidden, top_k, None)
        with override_config(stock_tile):
            stock = time_calls([call] * 6)
        found = []
        for tile in TILES:
            if not m // 64 <= tile[0] <= max(16, m // 4):
                continue
            with override_config(as_config(tile)):
                if not bits.differing(call(), want):
                    found.append((time_calls([call] * 6), tile))
                else:
                    print("differs", m, tile, flush=True)
        best = min(found)
        if best[0] < stock * 0.98:
            table[m] = as_config(best[1])
        else:
            table[m] = stock_tile | {"SPLIT_K": 1}
        lines.append(f"M={m} fixed {fixed:.1f} stock {stock:.1f} best {best[0]:.1f} us {best[1]}")
        print(lines[-1], flush=True)
    model = torch.cuda.get_device_name().replace(" ", "_")
    os.makedirs(sys.argv[5], exist_ok=True)
    with open(os.path.join(sys.argv[5], f"moe-{model}-E{experts}-N{n}.json"), "w") as file:
        json.dump(table, file, indent=1)


if __name__ == "__main__":
    main()
