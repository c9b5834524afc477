"""Runs in a child process with TRITON_INTERPRET=1 and tests every Ascend kernel.

Each kernel is compared with fp64 within a tolerance, and each row alone with the row in a batch, bitwise. Prints one
line per case: `ok NAME` or `FAIL NAME: reason`.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import canonical  # noqa: E402  beside this file
import torch  # noqa: E402

from bi_patch.kernels.ascend import attention, chips, matmul, pointwise, rows  # noqa: E402
from bi_patch.ops import bits  # noqa: E402

CHIP = chips.find("Ascend910B3")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LIMITS = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}
TILES = (chips.Tile(16, 32, 32), chips.Tile(32, 16, 32))


def report(name: str, wrong: str = "") -> None:
    print(f"FAIL {name}: {wrong}" if wrong else f"ok {name}", flush=True)


def close(name: str, got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    error = float((got.double() - want).norm() / want.norm())
    report(name, "" if error < LIMITS[dtype] else f"relative error {error:.2e}")


def same(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    wrong = bits.differing(got, want)
    report(name, f"{wrong} of {got.numel()} elements differ" if wrong else "")


def randn(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def matmuls() -> None:
    for dtype in DTYPES:
        x, w = randn(2, 19, 70, dtype=dtype), randn(2, 70, 37, dtype=dtype)
        for kind, bias in (
            ("none", None),
            ("row", randn(37, dtype=dtype)),
            ("full", randn(2, 19, 37, dtype=dtype)),
        ):
            case = f"matmul {dtype} bias {kind}"
            want = x.double() @ w.double() * 0.5 + (bias.double() * 2 if bias is not None else 0)
            outs = [matmul.matmul(x, w, CHIP, bias, 0.5, 2.0, tile) for tile in TILES]
            close(case, outs[0], want, dtype)
            same(f"{case} tiles of other rows and columns", outs[1], outs[0])
            held = bias[:, 3:4] if kind == "full" else bias
            same(f"{case} alone", matmul.matmul(x[:, 3:4], w, CHIP, held, 0.5, 2.0, TILES[0]), outs[0][:, 3:4])
        turned = w.transpose(1, 2).contiguous().transpose(1, 2)
        same(
            f"matmul {dtype} strides",
            matmul.matmul(x, turned, CHIP, tile=TILES[0]),
            matmul.matmul(x, w, CHIP, tile=TILES[0]),
        )
        same(f"matmul {dtype} chip's tile", matmul.matmul(x[:, :1], w, CHIP), matmul.matmul(x, w, CHIP)[:, :1])


def groups() -> None:
    counts = torch.tensor([3, 0, 17, 1])
    ends = counts.cumsum(0)
    for dtype in DTYPES:
        x, w, bias = randn(23, 40, dtype=dtype), randn(4, 40, 24, dtype=dtype), randn(4, 24, dtype=dtype)
        want = torch.zeros(23, 24, dtype=torch.float64)
        owner = torch.repeat_interleave(torch.arange(4), counts)
        want[:21] = torch.einsum("mk,mkn->mn", x[:21].double(), w[owner].double()) + bias[owner].double()
        got = matmul.grouped(x, w, ends, False, CHIP, bias, TILES[0])
        close(f"grouped {dtype}", got, want, dtype)
        same(f"grouped {dtype} counts", matmul.grouped(x, w, counts, True, CHIP, bias, TILES[1]), got)
        one = matmul.grouped(x[9:10], w, torch.tensor([0, 0, 1, 0]), True, CHIP, bias, TILES[0])
        same(f"grouped {dtype} alone", one, got[9:10])
        single = matmul.matmul(x[None, 9:10], w[2:3], CHIP, bias[2], tile=TILES[0])[0]
        same(f"grouped {dtype} is the plain product", single, got[9:10])


def reductions() -> None:
    for dtype in DTYPES:
        for cols in (7, 96, 2048, 5000):
            x = randn(6, cols, dtype=dtype)
            cases = {
                "softmax": (lambda v: rows.softmax(v, CHIP), x.double().softmax(-1)),
                "log_softmax": (
                    lambda v: rows.softmax(v, CHIP, torch.float32, True),
                    x.double().log_softmax(-1),
                ),
                "sum": (lambda v: rows.total(v.abs(), CHIP), x.double().abs().sum(-1)),
                "mean": (lambda v: rows.total(v.abs(), CHIP, mean=True), x.double().abs().mean(-1)),
                "cumsum": (lambda v: rows.cumsum(v.abs(), CHIP), x.double().abs().cumsum(-1)),
            }
            for name, (run, want) in cases.items():
                got = run(x)
                close(f"{name} {dtype} {cols}", got, want, dtype)
                same(f"{name} {dtype} {cols} alone", run(x[4:5]), got[4:5])
    x = randn(5, 48)
    at, probs = torch.tensor([4, 0, 2, 2, 1, 3]), torch.rand(3, 2)
    want = (x[at].view(3, 2, 48).double() * probs.double()[..., None]).sum(1)
    got = rows.weighted(x, at, probs, 2, CHIP)
    close("weighted", got, want, torch.float32)
    same("weighted alone", rows.weighted(x, at[2:4], probs[1:2], 2, CHIP), got[1:2])


def norms() -> None:
    for dtype in DTYPES:
        for cols in (96, 128, 1536, 5000):
            x, residual, weight = (randn(n, cols, dtype=dtype) for n in (5, 5, 1))
            weight = weight[0]
            for held in (None, residual):
                case = f"norm {cols} {dtype} {'residual' if held is not None else 'plain'}"
                got, summed = rows.rms_norm(x, weight, 1e-6, CHIP, held)
                base = x.double() if held is None else (x + held).double()
                want = base * (base.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
                close(case, got, want, dtype)
                if held is not None:
                    close(f"{case} sum", summed, x.double() + held.double(), dtype)
                one, _ = rows.rms_norm(x[3:4], weight, 1e-6, CHIP, None if held is None else held[3:4])
                same(f"{case} alone", one, got[3:4])
    heads = randn(3, 4, 32)
    same(
        "norm heads",
        rows.rms_norm(heads, None, 1e-6, CHIP)[0][1, 2],
        rows.rms_norm(heads[1, 2:3], None, 1e-6, CHIP)[0][0],
    )


def pointwises() -> None:
    for dtype in DTYPES:
        x = randn(5, 192, dtype=dtype)
        a, b = x.double().chunk(2, -1)
        got = pointwise.swiglu(x, CHIP)
        close(f"swiglu {dtype}", got, torch.nn.functional.silu(a) * b, dtype)
        same(f"swiglu {dtype} alone", pointwise.swiglu(x[2:3], CHIP), got[2:3])
        angles = torch.arange(64.0)[:, None] * torch.logspace(0, -3, 8)
        cache = torch.cat((angles.cos(), angles.sin()), -1)
        positions, q = torch.tensor([3, 0, 63]), randn(3, 2 * 24, dtype=dtype)
        got = pointwise.rotate(positions, q, cache, 24, CHIP)
        heads = q.double().view(3, 2, 24)
        cos, sin = (c[:, None].double() for c in cache[positions].chunk(2, -1))
        a, b, rest = heads[..., :8], heads[..., 8:16], heads[..., 16:]
        close(
            f"rotate {dtype}",
            got,
            torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1).view(3, 48),
            dtype,
        )
        same(f"rotate {dtype} alone", pointwise.rotate(positions[2:], q[2:], cache, 24, CHIP), got[2:])


def attentions() -> None:
    query_ends, kv_lens = [3, 4, 9], [130, 300, 5]
    for dtype in DTYPES:
        q = randn(9, 4, 32, dtype=dtype)
        keys = [randn(n, 2, 32, dtype=dtype) for n in kv_lens]
        values = [randn(n, 2, 32, dtype=dtype) for n in kv_lens]
        table = torch.tensor([[3, 1, -1], [0, 5, 2], [4, -1, -1]], dtype=torch.int32)
        paged = [torch.full((6, 128, 2, 32), float("nan"), dtype=dtype) for _ in range(2)]
        for sequence, n in enumerate(kv_lens):
            for place in range(n):
                for cache, held in zip(paged, (keys, values), strict=True):
                    cache[table[sequence, place // 128], place % 128] = held[sequence][place]
        sink = randn(4)
        for case, options in (
            ("causal", {}),
            ("window", {"window": 20}),
            ("all", {"causal": False}),
            ("sink", {"sinks": sink}),
        ):
            name = f"attention {dtype} {case}"
            run = lambda *a, options=options, **k: attention.attention(*a, **options, **k)  # noqa: E731
            flat = run(q, torch.cat(keys), torch.cat(values), query_ends, kv_lens, 0.2, CHIP, split=True)
            close(name, flat, reference(q, keys, values, query_ends, 0.2, **options), dtype)
            got = run(q, *paged, query_ends, kv_lens, 0.2, CHIP, block_table=table, split=False)
            same(f"{name} paged, in one program", got, flat)
            # First the fourth token alone, as in decode. Then a chunk of the third sequence's prompt.
            one = run(q[3:4], *paged, [1], [300], 0.2, CHIP, block_table=table[1:2])
            same(f"{name} decode", one, got[3:4])
            if options.get("causal", True):
                part = run(q[4:6], *paged, [2], [2], 0.2, CHIP, block_table=table[2:3])
                same(f"{name} chunk", part, got[4:6])


def reference(q, keys, values, query_ends, scale, causal=True, window=None, sinks=None) -> torch.Tensor:
    outs, first = [], 0
    for k, v, end in zip(keys, values, query_ends, strict=True):
        k, v = (t.double().repeat_interleave(2, 1) for t in (k, v))
        scores = torch.einsum("thd,shd->hts", q[first:end].double(), k) * scale
        at = torch.arange(len(k) - (end - first), len(k))[:, None]
        s = torch.arange(len(k))[None]
        seen = (s <= at) & (s >= at - (window if window is not None else 10**6)) if causal else s >= 0
        scores = scores.masked_fill(~seen, -float("inf"))
        if sinks is not None:
            extra = sinks.double()[:, None, None].expand(-1, end - first, 1)
            p = torch.cat((scores, extra), -1).softmax(-1)[..., :-1]
        else:
            p = scores.softmax(-1)
        outs.append(torch.einsum("hts,shd->thd", p, v))
        first = end
    return torch.cat(outs)


AREAS = {
    "matmul": matmuls,
    "grouped": groups,
    "reductions": reductions,
    "norm": norms,
    "pointwise": pointwises,
    "attention": attentions,
}

if __name__ == "__main__":
    canonical.install()
    for area in sys.argv[1:]:
        print(f"area {area}")
        torch.manual_seed(4)
        AREAS[area]()
