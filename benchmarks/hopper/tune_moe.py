"""Finds the fastest tile of the Triton experts for each number of tokens on the current GPU, and writes a table.

    PYTHONPATH=. python3 benchmarks/hopper/tune_moe.py EXPERTS N HIDDEN TOP_K OUT_FOLDER [ROWS,...]

The script first compares every tile bitwise with the fixed tile and skips a tile that differs. It times CUDA graphs of
calls that choose other experts each, so that few rows find no expert's weights in the L2 cache. The tiles of a number
of rows are timed in turns. The table is written anew after each number of rows.
"""

import functools
import json
import os
import sys

os.environ["BI_PATCH"] = "0"
CALLS = 6  # of one graph
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096)
# Tiles: block m, n, k, group, warps, stages.
TILES = (
    (16, 64, 64, 1, 4, 4),
    (16, 64, 128, 1, 4, 4),
    (16, 128, 64, 1, 4, 4),
    (16, 128, 128, 1, 4, 3),
    (16, 32, 128, 1, 4, 4),
    (16, 32, 128, 1, 4, 6),
    (16, 32, 256, 1, 4, 3),
    (16, 32, 256, 1, 4, 4),
    (16, 64, 128, 1, 4, 5),
    (16, 64, 128, 1, 8, 4),
    (16, 64, 256, 1, 4, 3),
    (16, 64, 256, 1, 8, 3),
    (16, 128, 128, 1, 8, 4),
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
    from vllm.model_executor.layers.fused_moe import override_config
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts, get_default_config

    from bi_patch.ops import bits
    from bi_patch.ops.cuda import moe, timing

    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5  # noqa: E731
    w13, w2 = make(experts, 2 * n, hidden), make(experts, hidden, n)
    table = {}
    model = torch.cuda.get_device_name().replace(" ", "_")
    os.makedirs(sys.argv[5], exist_ok=True)
    out = os.path.join(sys.argv[5], f"moe-{model}-E{experts}-N{n}.json")

    def calls(m: int, tile: dict) -> list:
        """Calls of other rows and other experts each."""

        def call(x, weights, ids):
            with override_config(tile):
                return fused_experts(x, w13, w2, weights, ids)

        made = []
        for seed in range(CALLS):
            generator = torch.Generator("cuda").manual_seed(seed)
            x = torch.randn(m, hidden, device="cuda", dtype=torch.bfloat16, generator=generator)
            scores = torch.randn(m, experts, device="cuda", generator=generator).softmax(-1)
            weights, ids = torch.topk(scores, top_k, dim=-1)
            made.append(functools.partial(call, x, weights, ids.to(torch.int32)))
        return made

    for m in map(int, sys.argv[6].split(",")) if len(sys.argv) > 6 else ROWS:
        want = [call() for call in calls(m, moe.FIXED)]
        default = get_default_config(m, experts, n, hidden, top_k, None) | {"SPLIT_K": 1}
        ways, tiles = [], []
        for tile in (default, *(as_config(t) for t in TILES if m // 64 <= t[0] <= max(16, m // 4))):
            if tile in tiles:
                continue
            way = calls(m, tile)
            try:
                if any(bits.differing(call(), w) for call, w in zip(way, want, strict=True)):
                    print("differs", m, tile, flush=True)
                    continue
            except Exception as error:  # e.g. more shared memory than a multiprocessor has
                print("fails", m, tile, repr(error)[:100], flush=True)
                continue
            ways.append(way)
            tiles.append(tile)
        us = timing.microseconds(ways, 12)
        order = sorted(range(len(us)), key=us.__getitem__)
        best = order[0] if us[order[0]] < us[0] * 0.98 else 0
        table[m] = tiles[best]
        shown = ", ".join(f"{us[i]:.1f} {tuple(tiles[i].values())}" for i in order[:4])
        print(f"M={m} default {us[0]:.1f} us; fastest: {shown}", flush=True)
        with open(out, "w") as file:
            json.dump(table, file, indent=1)


if __name__ == "__main__":
    main()
