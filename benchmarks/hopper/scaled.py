"""Times and compares products of 8-bit floats on one GPU: vLLM's, the library's and the bundled kernels.

    PYTHONPATH=. python3 benchmarks/hopper/scaled.py PART OUT.json

PART is rows (scales by row), pinned (vLLM's CUTLASS in upstream's mode), blocks (scales by 128 x 128), or deepgemm.
Each measurement is one line of the JSON file: the kernel, N, K, M, microseconds per call, and how many outputs differ
from the bundled reference in each of its forms. Times: see gemm.py.
"""

import json
import os
import sys
import time
import traceback

PART, OUT = sys.argv[1:3]
BIAS = "--bias" in sys.argv
os.environ["VLLM_BATCH_INVARIANT"] = "1" if PART == "pinned" else "0"
os.environ["BI_PATCH"] = "0"

import torch  # noqa: E402

from bi_patch.kernels.triton import scaled_gemm as sg  # noqa: E402
from bi_patch.ops import bits  # noqa: E402
from bi_patch.ops.cuda import cublaslt, timing  # noqa: E402
from bi_patch.ops.zero_sums import cancelling  # noqa: E402

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
COMPARED = (1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 192, 255, 256, 257, 511, 512)
COMPARED += (1000, 1024, 2048, 4096, 8192)
TIMED = (1, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
MOST = 8192  # rows
E4M3 = torch.float8_e4m3fn

lines, started = [], time.perf_counter()


def tell(**row):
    lines.append(row)
    with open(OUT, "w") as file:
        json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": lines}, file)
    if row.get("M") in (1, 64, 8192) or "error" in row:
        print(f"{time.perf_counter() - started:.0f}", row, flush=True)


class Trial:
    def __init__(self, name, grouped, powers=False):
        self.name, (self.n, self.k), self.grouped, self.powers = name, SHAPES[name], grouped, powers
        g = torch.Generator("cuda").manual_seed(self.n + self.k)
        order = torch.randperm(self.k, generator=g, device="cuda")
        if grouped:  # pairs within a group, so that each group's sum and the whole are zero
            order = torch.cat([torch.randperm(128, generator=g, device="cuda") + 128 * i for i in range(self.k // 128)])
        x = cancelling(MOST, order, 1, g, torch.bfloat16)
        w = cancelling(self.n, order, -1, g, torch.bfloat16)
        if grouped:
            x = torch.randn(MOST, self.k, device="cuda", generator=g) * 8
            w = torch.randn(self.n, self.k, device="cuda", generator=g) * 8
        else:
            w[1::2].abs_().mul_(0.125)
        self.x, self.w = x.to(E4M3), w.to(E4M3)

        def rand(*sizes):
            if powers:
                return 2.0 ** torch.randint(-9, -5, sizes, generator=g, device="cuda")
            return torch.rand(sizes, generator=g, device="cuda") * 0.02 + 0.001

        if grouped:
            self.xs = rand(self.k // 128, MOST).t()  # [M, K / 128], M contiguous
            self.ws = rand((self.n + 127) // 128, self.k // 128)
        else:
            self.xs, self.ws = rand(MOST), rand(self.n)
        self.bias = torch.randn(self.n, device="cuda", generator=g).bfloat16() if BIAS else None
        self.want = [self.triton(sg.REFERENCE, MOST)]
        copies = max(1, min(16, 110_000_000 // self.w.numel()))
        self.weights = [self.w] + [self.w.clone() for _ in range(copies - 1)]

    def scales(self, m):
        if not self.grouped:
            return self.xs[:m]
        part = self.xs[:m].t().contiguous()
        return part.t()

    def triton(self, tile, m):
        return sg.gemm(self.x[:m], self.w, self.scales(m), self.ws, self.bias, torch.bfloat16, tile)

    def by_tile(self, tile, m):
        xs = self.scales(m)
        return lambda w: sg.gemm(self.x[:m], w, xs, self.ws, self.bias, torch.bfloat16, tile)

    def tell(self, kernel, m, run, timed=None, **more):
        """run: weight -> output [m, n]."""
        row = dict(kernel=kernel, shape=self.name, N=self.n, K=self.k, M=m, bias=BIAS, **more)
        try:
            got = run(self.w)[:m]
            row["differ"] = [bits.differing(got, want[:m]) for want in self.want]
            if timed if timed is not None else m in TIMED:
                rounds = max(
                    1, min(64, int(300 / (self.w.numel() / 2e6 + m * self.n * self.k / 4e8))) // len(self.weights)
                )
                row["us"] = round(timing.microseconds([[lambda w=w: run(w) for w in self.weights] * rounds], 3)[0], 2)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            if "CUDA error" in row["error"] or "illegal" in row["error"]:
                tell(**row)
                sys.exit(3)
        tell(**row)

    def library(self, m):
        """The library's offers for m rows, each compared; the best time."""
        try:
            if not hasattr(self, "gemm"):
                self.gemm = cublaslt.ScaledGemm(self.n, self.k, torch.bfloat16, BIAS, 128 if self.grouped else 0)
            rows = m if not self.grouped else (m + 3) // 4 * 4
            offers = self.gemm.offers(rows)
        except Exception as error:
            return tell(kernel="cublaslt", shape=self.name, M=m, error=f"{type(error).__name__}: {error}"[:300])
        if not offers:
            return tell(kernel="cublaslt", shape=self.name, M=m, error="no offers")
        xs = self.scales(rows)
        out = torch.empty(rows, self.n, dtype=torch.bfloat16, device="cuda")

        def run(offer):
            def call(w):
                stream = torch.cuda.current_stream().cuda_stream
                self.gemm(
                    offer,
                    self.x.data_ptr(),
                    w.data_ptr(),
                    xs.data_ptr(),
                    self.ws.data_ptr(),
                    None if self.bias is None else self.bias.data_ptr(),
                    out.data_ptr(),
                    stream,
                )
                return out

            return call

        for index, offer in enumerate(offers):
            self.tell("cublaslt", m, run(offer), offer=index, kind=list(offer.kind), timed=None if index < 4 else False)


TILES = {
    "swap 16x64x256": sg.Tile(16, 64, 256, 4, 5, True),
    "swap 16x128x128": sg.Tile(16, 128, 128, 4, 6, True),
    "swap 32x64x256": sg.Tile(32, 64, 256, 4, 4, True),
    "swap 64x64x128": sg.Tile(64, 64, 128, 4, 5, True),
    "swap 64x128x128": sg.Tile(64, 128, 128, 4, 5, True),
    "16x64x256 mma": sg.Tile(16, 64, 256, 4, 5),
    "64x128x128": sg.Tile(64, 128, 128, 4, 4),
    "128x128x128": sg.Tile(128, 128, 128, 8, 4),
    "persistent 128x128x128": sg.Tile(128, 128, 128, 8, 4, False, 1),
    "persistent 128x256x128": sg.Tile(128, 256, 128, 8, 3, False, 1),
    "persistent 64x128x128": sg.Tile(64, 128, 128, 4, 5, False, 1),
}


def bundled(trial):
    for name, tile in TILES.items():
        if trial.grouped and tile.k != 128:
            continue
        for m in TIMED:
            if tile.m * 8 >= m and (tile.m <= 64 or m >= 64):
                trial.tell(f"triton {name}", m, trial.by_tile(tile, m))


def rows(trial):
    for m in COMPARED if PART == "rows" else TIMED:
        trial.tell("vllm cutlass" + (" pinned" if PART == "pinned" else ""), m, by_cutlass(trial, m))
        if PART == "rows":
            trial.library(m)
            if m in TIMED and not BIAS:
                trial.tell("torch rowwise", m, by_torch(trial, m))
    if PART == "rows" and not BIAS:
        bundled(trial)


def by_cutlass(trial, m):
    from vllm import _custom_ops as ops

    x, xs = trial.x[:m], trial.scales(m)
    xs, ws = (xs, trial.ws.t()) if trial.grouped else (xs.view(-1, 1), trial.ws.view(-1, 1))
    bias = None if trial.grouped else trial.bias
    return lambda w: ops.cutlass_scaled_mm(x, w.t(), scale_a=xs, scale_b=ws, out_dtype=torch.bfloat16, bias=bias)


def by_torch(trial, m):
    x, xs, ws = trial.x[:m], trial.xs[:m].view(-1, 1), trial.ws.view(1, -1)
    given = {"scale_a": xs, "scale_b": ws, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    return lambda w: torch._scaled_mm(x, w.t(), **given)


def by_vllm_triton(trial, m):
    from vllm.model_executor.layers.quantization.utils import fp8_utils

    x, xs = trial.x[:m], trial.scales(m)
    return lambda w: fp8_utils.w8a8_triton_block_scaled_mm(x, w, xs, trial.ws, [128, 128], torch.bfloat16)


def by_deepgemm(trial, m):
    from vllm.utils import deep_gemm

    x, xs = trial.x[:m], trial.scales(m)

    def run(w):
        out = torch.empty(m, trial.n, dtype=torch.bfloat16, device="cuda")
        deep_gemm.fp8_gemm_nt((x, xs), (w, trial.ws), out, is_deep_gemm_e8m0_used=False)
        return out

    return run


def blocks(trial):
    for m in COMPARED:
        trial.library(m)
        trial.tell("vllm triton block", m, by_vllm_triton(trial, m), powers=trial.powers)
        trial.tell("vllm cutlass block", m, by_cutlass(trial, m), powers=trial.powers)
    bundled(trial)


def deepgemm(trial):
    for m in (1, 64, 8192, 8, 16, 32, 128, 256, 512, 2048):  # the first calls compile
        trial.tell("deepgemm", m, by_deepgemm(trial, m), powers=trial.powers)


PARTS = {"rows": rows, "pinned": rows, "blocks": blocks, "deepgemm": deepgemm}


def main() -> None:
    for name in SHAPES:
        grouped = PART in ("blocks", "deepgemm")
        for powers in (False, True) if grouped and name == "o" else (False,):
            PARTS[PART](Trial(name, grouped, powers))
            torch.cuda.empty_cache()


try:
    main()
except Exception:
    traceback.print_exc()
    tell(error=traceback.format_exc()[-800:])
    sys.exit(1)
