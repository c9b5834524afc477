"""Times and compares products with packed weights of 4 or 8 bits on one GPU: Marlin, Machete and the bundled kernels.

    PYTHONPATH=. python3 benchmarks/hopper/packed.py OUT.json [--only SHAPE,...] [--rows M,...] [--schedules] [--bits]
        [--eight]

Each measurement is one line of the JSON file: kernel, shape, M, microseconds per call, and how many outputs differ from
the bundled GEMM of the dequantized weights. All kernels of one shape and M are timed in turns. --schedules measures
each schedule of Machete, too. --bits times nothing, and compares every form at up to 4096 rows. --eight: 8 bits,
and scales of whole rows where times are taken.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("VLLM_BATCH_INVARIANT", "0")
os.environ["BI_PATCH"] = "0"

import torch  # noqa: E402

from bi_patch.kernels.cuda import packed as four  # noqa: E402
from bi_patch.kernels.packing import pack  # noqa: E402
from bi_patch.kernels.triton import gemm as bf16  # noqa: E402
from bi_patch.ops import bits  # noqa: E402
from bi_patch.ops.cuda import machine, packed_linear, timing  # noqa: E402

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROWS = (1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)


def make(n, k, zeros=False, bits_=4, group=128):
    g = torch.Generator("cuda").manual_seed(n + k)
    q = torch.randint(0, 2**bits_, (n, k), generator=g, device="cuda", dtype=torch.uint8)
    scale = (torch.rand((n, k // group), generator=g, device="cuda") * 0.01 + 0.002).bfloat16()
    zero = torch.randint(0, 2**bits_, (n, k // group), generator=g, device="cuda", dtype=torch.uint8) if zeros else None
    return q, scale, zero


def words(q, bits_=4):
    """GPTQ's form [K * bits / 32, N] int32."""
    per = 32 // bits_
    held = q.T.contiguous().view(q.shape[1] // per, per, q.shape[0]).to(torch.int64)
    total = torch.zeros_like(held[:, 0])
    for i in range(per):
        total |= held[:, i] << (bits_ * i)
    return total.where(total < 2**31, total - 2**32).to(torch.int32)


lines, started = [], time.perf_counter()


def tell(out, **row):
    lines.append(row)
    Path(out).write_text(
        json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": lines})
    )


def vendors(q, scale, zero, bits_=4, group=128):
    """(name, run(x)) of vLLM's Machete and Marlin."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils as mu
    from vllm.scalar_type import scalar_types as st

    n, k = q.shape
    packed = words(q, bits_)
    kind = {(4, False): st.uint4b8, (4, True): st.uint4, (8, False): st.uint8b128, (8, True): st.uint8}
    kind = kind[bits_, zero is not None]
    s = scale.T.contiguous()
    size = -1 if group == k else group
    found = []
    try:
        mw = ops.machete_prepack_B(packed.t().contiguous().t(), torch.bfloat16, kind, torch.bfloat16)
        mz = None if zero is None else (-1.0 * s * zero.T.to(s.dtype)).contiguous()
        found.append(
            (
                "machete",
                lambda x, w, schedule=None: ops.machete_mm(
                    a=x, b_q=w, b_type=kind, b_group_zeros=mz, b_group_scales=s, b_group_size=size, schedule=schedule
                ),
                mw,
            )
        )
    except Exception as error:
        print("machete", repr(error)[:300], flush=True)
    try:
        w = ops.gptq_marlin_repack(packed, size_k=k, size_n=n, num_bits=bits_)
        ms = mu.marlin_permute_scales(s.clone(), size_k=k, size_n=n, group_size=group)
        if zero is None:
            z = mu.marlin_make_empty(torch.device("cuda"))
        else:
            z = mu.marlin_zero_points(zero.T.to(torch.int32).contiguous(), size_k=k // group, size_n=n, num_bits=bits_)
        space = mu.marlin_make_workspace_new(torch.device("cuda"))

        def run(x, w):
            return ops.marlin_gemm(
                x, None, w, None, ms, None, None, z, space, kind, x.shape[0], n, k, False, True, False
            )

        found.append(("marlin", run, w))
    except Exception as error:
        print("marlin", repr(error)[:300], flush=True)
    return found


def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("out")
    a.add_argument("--only", help="comma-separated shapes")
    a.add_argument("--rows", default="", help="comma-separated numbers of rows")
    a.add_argument("--schedules", action="store_true")
    a.add_argument("--bits", action="store_true", help="compare the forms as their certificate does, up to 4096 rows")
    a.add_argument("--eight", action="store_true", help="weights of 8 bits")
    a = a.parse_args()
    machine.forbid_split_k()
    problems = [problem._replace(bits=8) for problem in PROBLEMS] if a.eight else PROBLEMS
    with ThreadPoolExecutor(8) as pool:
        if a.bits:
            kinds = [(problem.group, problem.zeros, problem.dtype) for problem in problems]
        else:
            kinds = [(128, zeros, torch.bfloat16) for zeros in (False, True)]
            kinds = [(4096, False, torch.bfloat16)] if a.eight else kinds
        list(pool.map(lambda given: four.prepare(*given, 0), [(form, *kind) for kind in kinds for form in forms(a)]))
    if a.bits:
        for problem in problems:
            compare(a, problem)
            print(f"{time.perf_counter() - started:.0f} s {problem}", flush=True)
        return
    for name in a.only.split(",") if a.only else SHAPES:
        measure(a, name)
        print(f"{time.perf_counter() - started:.0f} s {name}", flush=True)


def forms(a):
    """The forms for weights of the chosen bits that this device runs."""
    capability = torch.cuda.get_device_capability()
    return [form for form in four.FORMS if form.bits == (8 if a.eight else 4) and form.runs_on(capability)]


_BF, _HALF = torch.bfloat16, torch.float16
PROBLEMS = (
    packed_linear.Problem(4096, 4096, _BF, False, 4, 128, False),
    packed_linear.Problem(1296, 2048, _BF, True, 4, 64, True),
    packed_linear.Problem(1296, 2048, _HALF, True, 4, 32, False),
    packed_linear.Problem(1296, 2048, _BF, False, 4, 2048, True),
)
COMPARED = (1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 33, 48, 63, 64, 65, 96, 127, 129, 192, 255, 257, 300, 383, 512, 513)
COMPARED += (700, 1000, 1024, 1025, 1500, 2047, 2048, 2049, 3000, 4095, 4096)


def compare(a, problem):
    """Every form against the bundled GEMM of the dequantized weights, and some rows alone against the same among m."""
    trial = packed_linear._Trial(problem, 4096)
    for number in packed_linear.runnable(problem):
        form = four.FORMS[number]
        wrong = {m: trial.differs(number, m) for m in COMPARED if form.serves(m) or m < 8 * form.tiles}
        alone = 0
        for at in (0, 5, 100, 4095):
            one = trial._run(number, trial._take(at, 1), trial.packed)
            alone += bits.differing(one, trial.want[at : at + 1])
        rows = {m: count for m, count in wrong.items() if count}
        tell(a.out, problem=str(problem), form=list(form), M=len(wrong), compared=list(wrong), wrong=rows, alone=alone)


def measure(a, name):
    n, k = SHAPES[name]
    held_bits = 8 if a.eight else 4
    group = k if a.eight else 128
    q, scale, zero = make(n, k, name == "qkv" and not a.eight, held_bits, group)
    packed = pack(q, scale, zero, held_bits)
    w = four.dequantize(packed)
    middle = 2 ** (held_bits - 1) if zero is None else zero.float()[..., None]
    exact = ((q.float().view(n, k // group, group) - middle) * scale.float()[..., None]).view(n, k)
    print(name, "dequantized differs", bits.differing(w, exact.bfloat16()), flush=True)
    x = torch.randn(4096, k, device="cuda", generator=torch.Generator("cuda").manual_seed(3)).bfloat16()
    want = bf16.gemm(x, w, None, bf16.REFERENCE)
    double = x[:64].double() @ exact.double().T
    copies = max(1, min(24, 120_000_000 // packed.data.nbytes))
    ways = [
        ({"kernel": kernel}, run, [held, *(held.clone() for _ in range(copies - 1))])
        for kernel, run, held in vendors(q, scale, zero, held_bits, group)
    ]
    ours = [packed, *(packed._replace(data=packed.data.clone()) for _ in range(copies - 1))]
    dense = [w, *(w.clone() for _ in range(min(3, copies - 1)))]
    ways.append(({"kernel": "dense"}, lambda v, d: torch.mm(v, d.T), dense))
    ways.append(({"kernel": "dequantize + dense"}, lambda v, p: torch.mm(v, four.dequantize(p).T), ours))
    if a.schedules and not a.eight and ways[0][0]["kernel"] == "machete":
        run, weights = ways[0][1:]
        for schedule in schedules(zero is not None):
            say = {"kernel": "machete", "schedule": schedule}
            ways.append((say, lambda v, d, s=schedule: run(v, d, schedule=s), weights))
    for form in forms(a):
        ways.append(({"kernel": "bundled", "form": list(form)}, lambda v, p, f=form: four.product(v, p, None, f), ours))
    for m in map(int, a.rows.split(",")) if a.rows else ROWS:
        turns(a.out, name, m, x[:m], want[:m], double, ways)


def turns(out, name, m, x, want, double, ways):
    """Time all ways for m rows in turns, so that each sees the same clock and the same company."""
    timed = []
    for say, run, weights in ways:
        row = {"shape": name, "M": m, **say}
        if "form" in say and not four.Form(*say["form"]).serves(m) or "schedule" in say and m > 1024:
            continue
        try:
            got = run(x, weights[0])
            torch.cuda.synchronize()
            row["differ"] = bits.differing(got, want)
            if m == 64:
                row["error"] = float((got.double() - double).norm() / double.norm())
            n, k = want.shape[1], x.shape[1]
            rounds = max(1, min(24, int(2000 / (n * k / 4e6 + m * n * k / 3e8))) // len(weights))
            timed.append((row, [lambda v=v, r=run: r(x, v) for v in weights] * rounds))
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            tell(out, **row)
            if "CUDA error" in row["failed"] or "illegal" in row["failed"]:
                sys.exit(3)
    for (row, _), us in zip(timed, timing.microseconds([calls for _, calls in timed], 5), strict=True):
        tell(out, **row, us=round(us, 2))


def schedules(zeros):
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types as st

    half = torch.bfloat16
    return ops.machete_supported_schedules(half, st.uint4 if zeros else st.uint4b8, half, half if zeros else None)


if __name__ == "__main__":
    main()
