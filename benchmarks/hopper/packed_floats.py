"""Compares and times products with NVFP4 weights on one Hopper GPU: the bundled kernels' forms, and vLLM's Marlin.

    PYTHONPATH=. python3 benchmarks/hopper/packed_floats.py OUT.json [--only bits|times] [--seconds 60]

Bits: every form against the bundled GEMM of the dequantized weights, as the certificate does, also in groups of 32 and
with a bias, and the dequantized weights against fp64. The one scale of all weights is a power of two there; with
another, every form is compared with the first. Times: at the sizes of Qwen3-8B, all kernels of one size and number of
rows in turns.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import nvfp4
import packed as packs
import torch

from bi_patch.kernels.cuda import packed as four
from bi_patch.kernels.packing import pack_floats
from bi_patch.ops import bits
from bi_patch.ops.cuda import machine, packed_linear

ROWS = (1, 8, 64, 256, 2048)
PROBLEMS = ((1296, 2048, True, 16), (1296, 2048, False, 32), (4096, 4096, False, 16))
COMPARED = (1, 2, 3, 7, 8, 9, 16, 17, 31, 33, 64, 65, 127, 129, 255, 257, 500, 513, 1025, 2047, 2048)
VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def codes(weight):
    """uint8 [N, K / 2], two in a byte, as [N, K]."""
    return torch.stack((weight & 15, weight >> 4), -1).flatten(1)


def exact(q, scale):
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=torch.float64, device=q.device)
    return table[q.long()] * scale.double().repeat_interleave(q.shape[1] // scale.shape[1], 1)


def compare(out, n, k, bias, group):
    problem = packed_linear.Problem(n, k, torch.bfloat16, bias, 4, group, False, True)
    trial = packed_linear._Trial(problem, 2048)
    other = trial.packed._replace(whole=trial.packed.whole * 0.7310)
    want = None
    for number in packed_linear.runnable(problem):
        form = four.FORMS[number]
        wrong = {m: trial.differs(number, m) for m in COMPARED if form.serves(m) or m < 8 * form.tiles}
        got = four.product(trial.x[:300], other, trial.bias, form)
        want = got if want is None else want
        wrong |= {"another scale": bits.differing(got, want)}
        alone = bits.differing(four.product(trial.x[7:8].clone(), other, trial.bias, form), want[7:8])
        row = {"form": list(form), "M": len(wrong), "wrong": {m: c for m, c in wrong.items() if c}, "alone": alone}
        packs.tell(out, problem=str(problem), **row)
        print(str(problem), row, flush=True) if row["wrong"] or alone else None


def measure(out, name, end):
    n, k = nvfp4.SIZES[name]
    held = nvfp4.weights(n, k, False, torch.Generator("cuda").manual_seed(n + k))
    scale = held["weight_scale"]
    packed = pack_floats(codes(held["weight"]), scale, torch.tensor(1 / 64, device="cuda"))
    same = (four.dequantize(packed).double() == exact(codes(held["weight"]), scale) / 128).all()
    print(name, "dequantized exact", bool(same), flush=True)
    x = torch.randn(max(ROWS), k, device="cuda", generator=torch.Generator("cuda").manual_seed(3)).bfloat16()
    want = four.product(x, packed, None, next(form for form in four.FORMS if form.wide))
    double = x[:64].double() @ exact(codes(held["weight"]), scale).T / 64
    copies = max(1, min(24, 120_000_000 // (n * k // 2)))
    marlin = [nvfp4.marlin(n, k, held) for _ in range(copies)]
    ours = [packed, *(packed._replace(data=packed.data.clone()) for _ in range(copies - 1))]
    ways = [({"kernel": "marlin"}, lambda v, run: run(v), marlin)]
    for number in packed_linear.runnable(packed_linear.Problem(n, k, torch.bfloat16, False, 4, 16, False, True)):
        form = four.FORMS[number]
        say = {"kernel": "bundled", "form": list(form)}
        ways.append((say, lambda v, p, f=form: four.product(v, p, None, f), ours))
    for m in ROWS:
        at = len(packs.lines)
        packs.turns(out, name, m, x[:m], want[:m], double, ways)
        found = [row for row in packs.lines[at:] if "us" in row]
        us = {kind: min((r["us"] for r in found if r["kernel"] == kind), default=0) for kind in ("marlin", "bundled")}
        best = next((r["form"] for r in found if r["us"] == us["bundled"]), None)
        differ = sum(r["differ"] for r in found if r["kernel"] == "bundled")
        errors = {r["kernel"]: round(r["error"], 6) for r in found if "error" in r}
        failed = [row["failed"] for row in packs.lines[at:] if "failed" in row][:1]
        print(name, m, us, best, "differ", differ, errors, failed, flush=True)
        if time.perf_counter() > end:
            return


def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("out")
    a.add_argument("--only", choices=("bits", "times"))
    a.add_argument("--seconds", type=float, default=60.0)
    a = a.parse_args()
    start = time.perf_counter()
    machine.forbid_split_k()
    forms = [form for form in four.FORMS if form.bits == 4 and form.runs_on(torch.cuda.get_device_capability())]
    kinds = [(form, group) for form in forms[::-1] for group in ((16, 32) if a.only != "times" else (16,))]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda g: four.prepare(g[0], g[1], False, torch.bfloat16, 0, False, True), kinds))
    print(f"{time.perf_counter() - start:.0f} s compiled", flush=True)
    if a.only != "times":
        for problem in PROBLEMS:
            compare(a.out, *problem)
        found = [row for row in packs.lines if "problem" in row]
        wrong = sum(sum(row["wrong"].values()) + row["alone"] for row in found)
        print(f"{time.perf_counter() - start:.0f} s bits: {len(found)} forms, {wrong} outputs differ", flush=True)
    if a.only != "bits":
        from vllm.config import VllmConfig, set_current_vllm_config

        with set_current_vllm_config(VllmConfig()):
            for name in ("gate_up", "qkv", "down", "o"):
                if time.perf_counter() < start + a.seconds:
                    measure(a.out, name, start + a.seconds)
                    print(f"{time.perf_counter() - start:.0f} s {name}", flush=True)


if __name__ == "__main__":
    main()
