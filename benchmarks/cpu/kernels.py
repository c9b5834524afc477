"""Times bi_patch's bundled CPU kernels, and beside them vLLM's oneDNN GEMM and stock CPU attention.

    PYTHONPATH=. python3 benchmarks/cpu/kernels.py CACHE_DIR [gemm|attention] [--quick] [--dtype bfloat16] [--sizes 0:4]

Needs vLLM's CPU build. Bundled and stock kernels run in turns; every time is the minimum over the repeats. "ratio" is
the bundled kernel's time divided by the stock kernel's: below 1, the bundled kernel is faster. "same": whether oneDNN
has the bundled GEMM's bits for random numbers, which hide most other orders. "TFLOP/s": of the bundled GEMM at the M
where it is highest. --sizes: which of the GEMM's sizes, as a slice. --alone: one thread, and the time that it had a
core: on a machine with other work, waiting for a core would hide the kernels' own time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import bi_patch_entry

GEMM_SHAPES = [
    (960, 576),
    (576, 576),
    (3072, 576),
    (576, 1536),
    (49152, 576),
    (3072, 1536),
    (9216, 1536),
    (1536, 4608),
]
GEMM_ROWS = [1, 8, 64, 512, 2048]
HEADS = [(9, 3, 64), (16, 4, 128)]
# A name, and (query tokens, tokens of context) of each request.
BATCHES = [
    ("prefill 512", [(512, 512)]),
    ("prefill 3000", [(3000, 3000)]),
    ("chunk 128 at 2600", [(128, 2728)]),
    *((f"decode {n} x {ctx}", [(1, ctx)] * n) for n in (1, 8, 64) for ctx in (300, 3000)),
]


clock = time.perf_counter


def alternate(fns, seconds: float) -> list[float]:
    """The minimum time of each callable in seconds by `clock`. They run in turns, for about `seconds` in total."""
    best = [float("inf")] * len(fns)
    for f in fns:
        f()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or (time.perf_counter() < end and rounds < 2000):
        for i, f in enumerate(fns):
            t = clock()
            f()
            best[i] = min(best[i], clock() - t)
        rounds += 1
    return best


def gemm_case(dtype: torch.dtype, n: int, k: int, m: int, seconds: float) -> tuple[float, float, bool]:
    """Seconds of the bundled GEMM and of oneDNN's for y [m, n] = x [m, k] @ w [n, k].T, and whether the bits agree."""
    from vllm import _custom_ops

    ours = torch.ops.bi_cpu
    x, w = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    handler, packed = _custom_ops.create_onednn_mm(w.t(), 32), ours.gemm_pack(w)
    fns = [lambda: ours.gemm(x, packed, n, k, None), lambda: _custom_ops.onednn_mm(handler, x, None)]
    same = torch.equal(fns[0](), fns[1]())
    a, b = alternate(fns, seconds)
    return a, b, same


def gemm(dtypes: list[torch.dtype], seconds: float, sizes: slice) -> None:
    heads = "".join(f"{f'M={m} us':>12}{'ratio':>7}{'same':>5}" for m in GEMM_ROWS)
    print(f"{'dtype':9}{'N':>6}{'K':>6}{heads}{'TFLOP/s':>10}")
    for dtype in dtypes:
        for n, k in GEMM_SHAPES[sizes]:
            print(f"{str(dtype)[6:]:9}{n:6}{k:6}", end="")
            best = 0.0
            for m in GEMM_ROWS:
                a, b, same = gemm_case(dtype, n, k, m, seconds)
                best = max(best, 2e-12 * n * k * m / a)
                print(f"{a * 1e6:12.1f}{a / b:7.2f}{'yes' if same else 'no':>5}", end="", flush=True)
            print(f"{best:10.2f}")


def attention_case(
    dtype: torch.dtype, h: int, kh: int, d: int, reqs: list[tuple[int, int]], seconds: float, bs: int = 128
) -> tuple[float, float, float, float]:
    """Seconds of attention, bundled and stock, then seconds of storing all keys and values, bundled and stock."""
    from vllm import _custom_ops as ops

    ours = torch.ops.bi_cpu
    blocks = [-(-s // bs) for _, s in reqs]
    table = torch.zeros(len(reqs), max(blocks), dtype=torch.int32)
    at = 1
    for r, b in enumerate(blocks):
        table[r, :b] = torch.arange(at, at + b)
        at += b
    pos = [torch.arange(s) for _, s in reqs]
    slots = torch.cat([table[r, p // bs].long() * bs + p % bs for r, p in enumerate(pos)])
    k, v = (torch.randn(len(slots), kh, d, dtype=dtype) for _ in "kv")
    q = torch.randn(sum(n for n, _ in reqs), h, d, dtype=dtype)
    start = torch.tensor([0] + [n for n, _ in reqs]).cumsum(0).int()
    lens = torch.tensor([s for _, s in reqs]).int()
    mine = torch.zeros(at, kh, bs, 2 * d, dtype=dtype)
    kc, vc = torch.zeros(at, kh, bs * 2, d, dtype=dtype).chunk(2, dim=2)
    scale = d**-0.5
    meta = ops.cpu_attn_get_scheduler_metadata(len(reqs), h, kh, d, lens, dtype, start, True, -1, "vec", True)
    out, ref = torch.empty_like(q), torch.empty_like(q)
    store = alternate(
        [
            lambda: ours.kv_store(k, v, mine, slots),
            lambda: ops.cpu_attn_reshape_and_cache(k, v, kc, vc, slots, "vec"),
        ],
        seconds / 4,
    )
    attend = alternate(
        [
            lambda: ours.attention(out, q, mine, start, lens, table, scale, -1, 0.0),
            lambda: ops.cpu_attention_with_kv_cache(
                q, kc, vc, ref, start, lens, scale, True, None, -1, table, 0.0, meta, None
            ),
        ],
        seconds,
    )
    torch.testing.assert_close(out, ref, atol=3e-2 if dtype == torch.bfloat16 else 1e-4, rtol=0.02)
    return *attend, *store


def attention(dtypes: list[torch.dtype], seconds: float, _: slice) -> None:
    print(f"{'dtype':9}{'heads':>12}  {'batch':20}{'ours us':>10}{'stock us':>10}{'ratio':>7}{'store':>7}")
    for dtype in dtypes:
        for h, kh, d in HEADS:
            for name, reqs in BATCHES:
                a, b, sa, sb = attention_case(dtype, h, kh, d, reqs, seconds)
                head = f"{str(dtype)[6:]:9}{f'{h}/{kh}/{d}':>12}  {name:20}"
                print(f"{head}{a * 1e6:10.1f}{b * 1e6:10.1f}{a / b:7.2f}{sa / sb:7.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache_dir", type=Path)
    parser.add_argument("what", nargs="*", default=["gemm", "attention"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="only this type; default: both")
    parser.add_argument("--sizes", default=":", help="which sizes of GEMM_SHAPES, e.g. 0:4")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--alone", action="store_true", help="one thread, by its own time on a core")
    args = parser.parse_args()
    global clock
    if args.alone:
        args.threads, clock = 1, time.thread_time
    # vLLM's stock kernels are timed too, so vLLM must not be armed.
    bi_patch_entry.without_arming()
    import vllm._C  # noqa: F401

    from bi_patch.kernels.cpu import load

    torch.set_num_threads(args.threads)
    from bi_patch.tools.verify.engine import cpu_name

    print(cpu_name(), "isa", load(args.cache_dir), "threads", torch.get_num_threads(), "by CPU time" * args.alone)
    dtypes = [getattr(torch, name) for name in ([args.dtype] if args.dtype else ["bfloat16", "float32"])]
    torch.manual_seed(0)
    for what in args.what:
        sizes = slice(*(int(end) if end else None for end in args.sizes.split(":")))
        {"gemm": gemm, "attention": attention}[what](dtypes, 0.1 if args.quick else 0.5, sizes)


if __name__ == "__main__":
    main()
