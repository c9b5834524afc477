"""Times the tiles of the bundled LoRA kernels on a GPU, and compares their bits with those of the present tiles.

    python benchmarks/hopper/lora_tiles.py OUT.json [--seconds 60] [--ranks 256,64]

One product's tile is changed at a time. OUT.json holds, for each case, microseconds of a call and differing elements.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
from lora import LAYERS, Runner, Stacks, microseconds, slots_of

SHRINK = [(m, r, w, s) for m in (16, 32, 64) for r in (32, 64, 128, 256) for w in (4, 8) for s in (2, 3, 4)]
EXPAND = [
    (m, n, r, w, s) for m in (16, 32, 64) for n in (64, 128, 256) for r in (32, 64, 128) for w in (4, 8) for s in (2, 3)
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--ranks", default="256,64")
    parser.add_argument("--rows", default="256,64,2048")
    asked = parser.parse_args()
    from bi_patch.kernels.triton import lora

    began, present = time.monotonic(), lora.tiles
    found = {"device": torch.cuda.get_device_name(), "rows": []}
    runner = Runner("bundled")
    cases = itertools.product(map(int, asked.ranks.split(",")), map(int, asked.rows.split(",")), ("qkv", "gate_up"))
    for rank, rows, layer in cases:
        k, sizes = LAYERS[layer]
        stacks = Stacks(k, sizes, rank, rows)
        meta = runner.meta(slots_of(rows, True))
        lora.tiles = present
        want = stacks.y.clone()
        runner(stacks, want, stacks.x, meta)
        own = present(rows, rank, 9)
        case = {"layer": layer, "rank": rank, "m": rows}
        found["rows"].append({**case, "tiles": own, "us": microseconds(runner, stacks, rows, True), "differing": 0})
        for tile in [(s, own[1]) for s in SHRINK] + [(own[0], e) for e in EXPAND]:
            if time.monotonic() - began > asked.seconds:
                break
            lora.tiles = lambda *_, tile=tile: tile
            try:
                got = stacks.y.clone()
                runner(stacks, got, stacks.x, meta)
                wrong = int((got.view(torch.int16) != want.view(torch.int16)).sum())
                us = microseconds(runner, stacks, rows, True)
                found["rows"].append({**case, "tiles": tile, "us": us, "differing": wrong})
            except Exception as error:
                found["rows"].append({**case, "tiles": tile, "error": f"{type(error).__name__}: {error}"[:200]})
            asked.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
