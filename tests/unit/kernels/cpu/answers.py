"""Loads the kernels of one ISA in a child process of the tests and prints digests of their results.

python answers.py CACHE_DIR ISA|- [FLAG ...]

Prints one JSON object. "wide" holds digests of fp32 and fp16 results, which are equal on every ISA. "bf16" holds those
of bf16. "leaves" holds digests of the fp32 attention of 512 tokens, one per 128 rows. The script fails if a row's bits
depend on other rows.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch

from bi_patch.kernels.cpu import load


def digest(x: torch.Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def gemm(ops, dtype: torch.dtype) -> list[str]:
    out = []
    for n, k in [(1, 1), (65, 33), (70, 577), (40, 1100), (40, 576), (34, 1024), (33, 2112)]:
        g = torch.Generator().manual_seed(1)
        x, w, b = (torch.randn(*s, generator=g).to(dtype) for s in ((37, k), (n, k), (n,)))
        packed = ops.gemm_pack(w)
        y = ops.gemm(x, packed, n, k, b)
        torch.testing.assert_close(y.double(), x.double() @ w.double().T + b.double(), atol=0.01, rtol=0.01)
        for m in (1, 2, 7, 16, 33):
            assert torch.equal(ops.gemm(x[:m], packed, n, k, b), y[:m]), m
            assert torch.equal(ops.gemm(x[-m:], packed, n, k, b), y[-m:]), m
        out.append(digest(y))
    return out


def attention(
    ops, dtype: torch.dtype, n: int, h: int, kh: int, d: int, window: int, cap: float, block: int = 16
) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, x, d, generator=g).to(dtype) for x in (h, kh, kh))
    blocks = -(-n // block)
    kv = torch.full((blocks, kh, block, 2 * d), float("nan"), dtype=dtype)
    ops.kv_store(k, v, kv, torch.arange(n))
    table = torch.arange(blocks, dtype=torch.int32)[None]

    def attend(first: int, end: int) -> torch.Tensor:
        out = torch.empty_like(q[first:end])
        start, lens = torch.tensor([0, end - first]).int(), torch.tensor([end]).int()
        ops.attention(out, q[first:end], kv, start, lens, table, 0.125, window, cap)
        return out

    out = attend(0, n)
    assert all(torch.equal(attend(e - 1, e), out[e - 1 : e]) for e in (1, 17, 256, 257, n))
    return out


def rows(ops, dtype: torch.dtype) -> list[str]:
    g = torch.Generator().manual_seed(2)
    x, residual = (torch.randn(9, 200, generator=g).to(dtype) for _ in range(2))
    normed, added = ops.add_rms_norm(x, residual, x[0], 1e-6, 0.0)
    turned = ops.rope(torch.arange(9), x, torch.rand(9, 36, generator=g).to(dtype), 50, True)
    weights, ids = ops.softmax_topk(x, 6, False)
    gated = (ops.silu_and_mul(x), ops.gelu_and_mul(x, True), ops.gelu_and_mul(x, False))
    each = (
        ops.sigmoid(x),
        ops.silu(x),
        ops.gelu(x, False),
        ops.gelu(x, True),
        ops.softplus(x, 1.0, 20.0),
        ops.rsqrt(x),
    )
    pooled = (ops.l2_normalize(x, 1e-12), ops.softmax(x), ops.mean_rows(x, torch.tensor([0, 4, 9])))
    return [digest(t) for t in (normed, added, turned, *gated, *each, *pooled, weights, ids)]


def main() -> None:
    cache, isa, *flags = sys.argv[1:]
    if "-include" in flags:  # an emulated ISA runs everywhere
        sys.modules["bi_patch.kernels.cpu.build"].runnable_isas = lambda: [isa]
    load(Path(cache), None if isa == "-" else isa, tuple(flags))
    torch.set_num_threads(1)
    ops = torch.ops.bi_cpu
    wide, narrow = [], []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        got = gemm(ops, dtype) + rows(ops, dtype)
        got += [digest(attention(ops, dtype, 300, 6, 2, 80, w, cap)) for w, cap in [(-1, 0.0), (50, 3.0)]]
        got.append(digest(attention(ops, dtype, 300, 4, 2, 64, -1, 0.0, 64)))
        if dtype != torch.bfloat16:  # in bf16, an ISA with bf16 dot products gives other bits
            wide += got
        else:
            narrow = got
    whole = attention(ops, torch.float32, 512, 2, 2, 64, -1, 0.0)
    print(json.dumps({"wide": wide, "bf16": narrow, "leaves": [digest(x) for x in whole.split(128)]}))


if __name__ == "__main__":
    main()
