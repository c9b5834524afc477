"""Compares and times attention over an e4m3 KV cache on one Hopper GPU.

    PYTHONPATH=. python3 benchmarks/hopper/eighths.py OUT.json [--only bits|times|forms|prompts] [--between]

Bits: the certificate (the decode kernel in every form that serves against FlashAttention 3 over a 16-bit copy), and the
rows of one mixed step, in a large and in a small scratch, against the same rows in one piece. Times: microseconds of a
layer's decode in captured graphs, by the e4m3 form, by the 16-bit form, and by FlashAttention 3 as stock calls it.
Prompts: of the copy, of the copy with FlashAttention 3, and of FlashAttention 3 over e4m3 and over 16-bit pages. Forms:
bits and times of other forms. With --between, times of decode are those after another kernel, as in an engine.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import attention as calls  # sets the environment
import stamp
from gemm import time_calls

from bi_patch.kernels.cuda import nvrtc
from bi_patch.ops.certificates import Key

CASES = {"128": (32, 8, 128), "64": (32, 8, 64), "256": (16, 2, 256)}  # heads, key heads, head size
LOADS = ((1, 576), (8, 1088), (64, 576), (256, 1088), (2, 32000))
MORE_LOADS = ((1, 32000), (1, 131072), (8, 8000), (64, 1000), (256, 600))  # with --between
PROMPTS = (((8192, 0),), ((512, 0),) * 16, ((2048, 30000),))  # new and cached tokens of each request of a step
PAGE, CALLS, MOST = 16, 12, 33000
# Forms to choose from, besides those that serve: parts, scorers, summers, carriers, apart, shares, late.
MORE = {
    "128": (
        *((1, 4, 2, 4, False, 2), (2, 3, 2, 3, False, 1), (4, 3, 2, 2, False, 1), (4, 3, 2, 6, False, 1)),
        *((1, 4, 4, 2, False, 1, True), (1, 2, 4, 1, False, 1, True), (2, 4, 2, 2, False, 1, True)),
        *((4, 3, 2, 2, False, 1, True), (8, 3, 1, 3, True, 1, True)),
    ),
    "64": ((1, 6, 4, 3, False, 1), (1, 6, 2, 6, False, 2), (4, 3, 1, 6, True, 1)),
    "256": ((1, 3, 2, 3, False, 1), (2, 2, 4, 4, False, 1), (4, 2, 2, 8, False, 1), (8, 2, 1, 4, True, 1)),
}


def ints(values):
    import torch

    return torch.tensor(values, dtype=torch.int32, device="cuda")


def forms(case):
    """The e4m3 forms that serve, then those of MORE."""
    from bi_patch.kernels.cuda import decode

    heads, key_heads, size = CASES[case]
    served, more = serving(case), [decode.Form(size, heads // key_heads, *numbers) for numbers in MORE[case]]
    return [*served, *(form for form in more if form not in served)]


def compile_ahead(cases, more: bool) -> None:
    """Compile the forms of these cases side by side: those that serve, or all."""
    import torch

    from bi_patch.kernels.cuda import decode, nvrtc

    arch, major = nvrtc.target(0)
    wanted = [form for case in cases for form in forms(case)[: None if more else len(serving(case))]]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda form: decode.build(form, torch.bfloat16, arch, major), wanted))


def serving(case):
    """The e4m3 forms that serve."""
    from bi_patch.kernels.cuda import decode

    heads, key_heads, size = CASES[case]
    return [*decode.forms_on(size, heads // key_heads, 0, True)]


def compare(case, keep) -> None:
    """The certificate of the forms that serve."""
    import tempfile

    import torch

    from bi_patch.ops.cuda import attention
    from bi_patch.seams.cuda import eighths as route

    problem = attention.Problem(*CASES[case], torch.bfloat16, torch.float8_e4m3fn)
    with tempfile.TemporaryDirectory() as folder:
        found = attention.certify(problem, route.prefill, "benchmark", Path(folder)).evidence
    told = {"compared": found.compared, "differing": found.differing, "first": found.first[:200]}
    keep(case=case, forms=len(serving(case)), **told)


def compare_each(case, keep, end) -> None:
    """Each other form by itself."""
    import torch

    from bi_patch.kernels.cuda import decode
    from bi_patch.ops.cuda import attention
    from bi_patch.seams.cuda import eighths as route

    problem, served = attention.Problem(*CASES[case], torch.bfloat16, torch.float8_e4m3fn), decode.serving
    try:
        for form in forms(case)[len(serving(case)) :]:
            if time.monotonic() > end:
                return
            if form.parts > 1 and not decode.kernel(form, problem.dtype, 0).clusters(form.parts):
                continue
            decode.serving = lambda *_: [form]  # noqa: B023
            key = Key("", str(problem), "", "", "")
            found = attention._certify(problem, route.prefill, key).evidence
            keep(case=case, form=tuple(form)[2:], differing=found.differing, first=found.first[:120])
    finally:
        decode.serving = served


def mixed(case, keep) -> None:
    """A step of prompts and single queries against each prompt in one piece."""
    import torch

    from bi_patch.ops import bits
    from bi_patch.ops.cuda import attention, eighths
    from bi_patch.seams.cuda import eighths as route
    from bi_patch.seams.cuda.attention import _plain

    heads, key_heads, size = CASES[case]
    tokens, cuts = 3000, [(2999, 1), (0, 700), (700, 1), (701, 2), (1, 1), (1000, 2000), (128, 1), (0, 5), (900, 90)]
    q, pages = torch.randn(tokens, heads, size, device="cuda", dtype=torch.bfloat16), -(-tokens // PAGE)
    k, v = held(pages, key_heads, size, torch.float8_e4m3fn)
    table = torch.randperm(pages, device="cuda").to(torch.int32)[None]
    for x in (k, v):  # NaN past the last token
        x.view(torch.uint8)[int(table[0, -1]), tokens % PAGE :] = 0x7F
    scales = torch.linspace(0.3, 1.7, key_heads, device="cuda"), torch.linspace(1.1, 0.2, key_heads, device="cuda")
    want = route.prefill(q, k, v, table, 0.07, scales)
    rows = torch.cat([torch.arange(first, first + new) for first, new in cuts]).cuda()
    starts = ints([0, *(new for _, new in cuts)]).cumsum(0, dtype=torch.int32)
    kept, large = [*eighths._scratch], eighths._scratch[0].numel()
    for name, size_of in (("large", large), ("small", eighths.pages_of(tokens) * 2 * eighths.PAGE * size * 2)):
        eighths._scratch[:] = [torch.full((size_of,), 0xFF, dtype=torch.uint8, device="cuda")]  # NaN
        given = {
            **{"q": q[rows], "k": k, "v": v, "out": torch.empty_like(q[rows]), "cu_seqlens_q": starts},
            **{"max_seqlen_q": 2000, "seqused_k": ints([sum(cut) for cut in cuts]), "max_seqlen_k": tokens},
            **{"block_table": table.expand(len(cuts), -1).contiguous(), "softmax_scale": 0.07, "causal": True},
            **{"window_size": [-1, -1], "fa_version": 3, "num_splits": 1},
            **{name: scale.expand(len(cuts), -1) for name, scale in zip(("k_descale", "v_descale"), scales)},
        }
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        route.attend(flash_attn_varlen_func, _plain(given), **given)
        keep(case=case, step=name, compared=want[rows].numel(), differing=bits.differing(given["out"], want[rows]))
    eighths._scratch[:] = kept
    assert attention.serves(attention.Problem(heads, key_heads, size, torch.bfloat16, torch.float8_e4m3fn))


def held(pages, key_heads, size, dtype):
    """K and V of random pages, side by side, as in vLLM."""
    import torch

    cache = torch.randn(pages, PAGE, key_heads, 2 * size, device="cuda", dtype=torch.bfloat16).to(dtype)
    return cache.split(size, dim=-1)


def layers(pages, key_heads, size, dtype):
    """So many layers that L2 cannot hold all."""
    bytes_each = pages * PAGE * key_heads * 2 * size * dtype.itemsize
    return [held(pages, key_heads, size, dtype) for _ in range(max(2, min(CALLS, (256 << 20) // bytes_each)))]


def between():
    """A product that reads 100 MB, as between two layers' attention: caches hold neither KV nor code of attention."""
    import torch

    weight = torch.randn(12288, 4096, device="cuda", dtype=torch.bfloat16)
    rows = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(64, 12288, device="cuda", dtype=torch.bfloat16)
    return partial(torch.mm, rows, weight.t(), out=out)


def times(case, keep, end, all_forms, cold) -> None:
    import torch

    from bi_patch.kernels.cuda import decode

    other = between() if cold else None
    alone = time_calls([other] * CALLS) if cold else 0.0

    heads, key_heads, size = CASES[case]
    eighth, scales = torch.float8_e4m3fn, (torch.ones((), device="cuda").expand(key_heads),) * 2
    for number, context in (*LOADS, *(MORE_LOADS if cold else ())):
        blocks = -(-context // PAGE)
        table = torch.randperm(number * blocks, device="cuda").to(torch.int32).view(number, blocks)
        q = torch.randn(number, heads, size, device="cuda", dtype=torch.bfloat16)
        out, starts, lengths = torch.empty_like(q), ints(range(number + 1)), ints([context] * number)

        def tell(way, made):
            if time.monotonic() < end:
                us = timed(made, other, alone)
                keep(case=case, requests=number, context=context, way=way, us=us, between=cold)  # noqa: B023

        of = {dtype: layers(number * blocks, key_heads, size, dtype) for dtype in (eighth, torch.bfloat16)}
        rest = out, starts, lengths, table, size**-0.5, context
        ways = {"e4m3": (eighth, {"scales": scales}), "16 bits": (torch.bfloat16, {})}
        if all_forms:
            del ways["e4m3"]
            ways |= {str(tuple(form)[2:]): (eighth, {"scales": scales, "form": form}) for form in forms(case)}
        for way, (dtype, more) in ways.items():
            tell(way, lambda: [partial(decode.attend, q, *pair, *rest, **more) for pair in some(of[dtype])])  # noqa: B023
        stock = partial(calls.flash, longest_q=1, window=0, cap=0.0, longest_k=context, splits=32)
        for dtype in of:
            own = q.to(dtype)
            way = "FlashAttention 3, e4m3" if dtype == eighth else "FlashAttention 3"
            tell(way, lambda: [partial(stock, own, *pair, table, starts, lengths) for pair in some(of[dtype])])  # noqa: B023


def some(pairs):
    return islice(cycle(pairs), CALLS)


def timed(made, other=None, alone=0.0):
    """Microseconds of a call. other: what runs before each call, and takes `alone` microseconds."""

    def both(call):
        other()
        call()

    try:
        calls = made()
        return round(time_calls([partial(both, call) for call in calls] if other else calls) - alone, 2)
    except Exception as error:  # a refusal by a library is a result, too
        return f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"


def prompts(case, keep, end) -> None:
    import torch
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    from bi_patch.ops.cuda import eighths
    from bi_patch.seams.cuda import eighths as route

    heads, key_heads, size = CASES[case]
    eighth, scales = torch.float8_e4m3fn, (torch.ones((), device="cuda").expand(key_heads),) * 2
    for step in PROMPTS:
        counts, most = [new for new, _ in step], [sum(cut) for cut in step]
        blocks, longest = -(-max(most) // PAGE), max(most)
        table = torch.randperm(len(step) * blocks, device="cuda").to(torch.int32).view(len(step), blocks)
        q = torch.randn(sum(counts), heads, size, device="cuda", dtype=torch.bfloat16)
        starts, lengths = ints([0, *counts]).cumsum(0, dtype=torch.int32), ints(most)
        of = {dtype: layers(len(step) * blocks, key_heads, size, dtype)[:4] for dtype in (eighth, torch.bfloat16)}
        plan = eighths.plan(counts, most, starts, lengths, key_heads, eighths.room(size))
        given = {
            **{"out": torch.empty_like(q), "q": q, "block_table": table, "softmax_scale": size**-0.5, "causal": True},
            **{"window_size": [-1, -1], "fa_version": 3, "num_splits": 1},
        }

        def copy(pair):
            for run in plan.runs:  # noqa: B023
                some_heads = [x[:, :, : run.heads] for x in pair]
                own = [scale[: run.heads] for scale in scales]
                eighths.widened(*some_heads, own, table[slice(*run.requests)], run, q.dtype)  # noqa: B023

        def both(pair):
            for run in plan.runs:  # noqa: B023
                route._prefill(flash_attn_varlen_func, given | dict(zip("kv", pair)), run, scales)  # noqa: B023

        stock = partial(calls.flash, longest_q=max(counts), window=0, cap=0.0, longest_k=longest, splits=1)
        ways = {
            "copy": lambda pair: partial(copy, pair),  # noqa: B023
            "copy and FlashAttention 3": lambda pair: partial(both, pair),  # noqa: B023
            "FlashAttention 3, e4m3": lambda pair: partial(stock, q.to(eighth), *pair, table, starts, lengths),  # noqa: B023
            "FlashAttention 3": lambda pair: partial(stock, q, *pair, table, starts, lengths),  # noqa: B023
        }
        for way, make in ways.items():
            pairs = of[torch.bfloat16 if way == "FlashAttention 3" else eighth]
            if time.monotonic() < end:
                us = timed(lambda: [make(pair) for pair in pairs])  # noqa: B023
                keep(case=case, step=f"{len(step)} x {step[0]}", runs=len(plan.runs), way=way, us=us)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=("bits", "times", "forms", "prompts"))
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--between", action="store_true", help="before each call of decode, another kernel")
    parser.add_argument("--seconds", type=float, default=60, help="begin nothing after so many seconds")
    a = parser.parse_args()
    end, rows, cases = time.monotonic() + a.seconds, [], a.case or [*CASES]

    from bi_patch.ops.cuda import eighths

    nvrtc.folder = Path("/tmp/bi_patch-eighths")
    eighths.reserve(max(eighths.bytes_of(key_heads, size, MOST, 8192) for _, key_heads, size in CASES.values()))

    def keep(**row):
        rows.append(row)
        print(row, flush=True)
        a.out.write_text(json.dumps({**stamp.head(), "rows": rows}, indent=1))

    compile_ahead(cases, False)
    for what in ("bits", "times", "prompts", "forms"):
        for case in cases:
            if a.only not in (None, what) or time.monotonic() > end:
                continue
            try:
                if what == "bits":
                    compare(case, keep)
                    mixed(case, keep)
                elif what == "prompts":
                    prompts(case, keep, end)
                else:
                    if what == "forms":
                        compile_ahead([case], True)
                        compare_each(case, keep, end - 0.4 * a.seconds / len(cases))  # times need the rest
                    times(case, keep, end, what == "forms", a.between)
            except Exception as error:
                keep(case=case, what=what, error=f"{type(error).__name__}: {str(error)[:400]}")


if __name__ == "__main__":
    main()
