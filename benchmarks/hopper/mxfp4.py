"""Compares and times a layer of gpt-oss's experts in MXFP4 on one Hopper GPU: the bundled kernel, Humming's, Marlin.

    PYTHONPATH=. python3 benchmarks/hopper/mxfp4.py OUT.json [--only bits|times] [--forms] [--seconds 60]

Bits: the certificates of both products of a layer, every form against the bundled GEMM of the dequantized weights, and
rows of a layer among different numbers of rows. Times: a layer's two products with what is around them, as vLLM's
method runs them, on each kernel, with the same random weights and the same experts for each token, in turns. Humming's
kernel has its batch-invariant schedules; Marlin is what vLLM takes without upstream's mode where Humming is not
installed. Marlin's layer has its own greater sizes, and `x` has them, too. --forms: times of each form of the bundled
kernel, the products alone.
"""

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import bi_patch_entry

bi_patch_entry.without_arming()

import torch  # noqa: E402

from bi_patch.kernels.cuda import packed as four  # noqa: E402
from bi_patch.kernels.packing import Packed  # noqa: E402
from bi_patch.ops import bits  # noqa: E402
from bi_patch.ops.cuda import linear, machine, packed_experts, timing  # noqa: E402
from bi_patch.tools.models import expert_layers  # noqa: E402

SIZES = {"gpt-oss-20b": (32, 4), "gpt-oss-120b": (128, 4)}  # experts, and experts of a token
HIDDEN = INNER = 2880
TOKENS = (1, 8, 64, 256, 2048)
ROWS = (1, 2, 3, 5, 8, 17, 33, 64, 129, 256, 513)
FORMS_AT = (64, 2048, 256, 1, 8, 512, 128, 32, 8192, 16)  # tokens, the most important first
# Forms that do not serve, beside those that do.
CANDIDATES = (
    four.Form(2, 1, 3, blocks=2),
    four.Form(8, 1, 2, blocks=2),
    four.Form(4, 4, 2, blocks=2),
    four.Form(8, 4, 6, True),
    four.Form(4, 8, 6, True),
    four.Form(8, 16, 4, True),
)
INVARIANT = {"bundled": "1", "humming": "1", "marlin": "0"}
lines, started = [], time.perf_counter()


def tell(out, **row):
    import vllm

    lines.append(row)
    said = {"device": torch.cuda.get_device_name(), "vllm": vllm.__version__, "torch": torch.__version__}
    Path(out).write_text(json.dumps(said | {"date": time.strftime("%Y-%m-%d"), "rows": lines}, indent=1))
    print(f"{time.perf_counter() - started:.0f} s", row, flush=True)


def method(kernel, experts, top):
    """vLLM's method for a layer on a kernel."""
    from vllm.model_executor.layers.quantization import mxfp4 as module

    from bi_patch.seams.cuda import mxfp4 as seam

    os.environ["VLLM_BATCH_INVARIANT"] = INVARIANT[kernel]
    backend = "auto" if kernel == "bundled" else kernel
    moe = expert_layers.config(experts, top, HIDDEN, INNER, "SWIGLUOAI", has_bias=True, moe_backend=backend)
    init = module.GptOssMxfp4MoEMethod.__init__
    made = object.__new__(module.GptOssMxfp4MoEMethod)
    (seam._chosen(init) if kernel == "bundled" else init)(made, moe)
    return made, moe


def layer(kernel, experts, top):
    """A layer on a kernel, with weights that depend on the number of experts alone, and its method."""
    from vllm.model_executor.layers.quantization import mxfp4 as module

    from bi_patch.seams.cuda import mxfp4 as seam

    made, moe = method(kernel, experts, top)
    hidden, inner = made.maybe_roundup_sizes(HIDDEN, INNER, torch.bfloat16, moe.moe_parallel_config)
    moe.hidden_dim, moe.intermediate_size_per_partition = hidden, inner
    held = expert_layers.layer(made, moe, hidden, inner, layer_name="experts")
    g = torch.Generator("cuda").manual_seed(experts)
    for name, n, k in (("w13", 2 * INNER, HIDDEN), ("w2", HIDDEN, INNER)):
        words = torch.randint(0, 256, (experts, n, k // 2), generator=g, device="cuda", dtype=torch.uint8)
        scale = torch.randint(118, 121, (experts, n, k // 32), generator=g, device="cuda").to(torch.uint8)
        getattr(held, f"{name}_weight").data[:, :n, : k // 2] = words
        getattr(held, f"{name}_weight_scale").data[:, :n, : k // 32] = scale
        getattr(held, f"{name}_bias").data[:, :n] = torch.randn((experts, n), generator=g, device="cuda") * 0.1
    convert = module.convert_gpt_oss_weight_to_mxfp4_moe_kernel_format
    try:
        module.convert_gpt_oss_weight_to_mxfp4_moe_kernel_format = seam._packed(convert)
        made.process_weights_after_loading(held)
    finally:
        module.convert_gpt_oss_weight_to_mxfp4_moe_kernel_format = convert
    torch.cuda.empty_cache()
    return held, made, hidden


def routed(experts, top, tokens, seed):
    return expert_layers.routed(tokens, experts, top, HIDDEN, tokens * 100 + seed)


def run(held, made, hidden, x, weights, ids):
    return made.apply(held, torch.nn.functional.pad(x, (0, hidden - HIDDEN)), weights, ids, None, None)[:, :HIDDEN]


def certify(out, held):
    """The certificates of the layer's two products. Without them the kernel does not serve."""
    from bi_patch.seams.cuda import packed_products

    with tempfile.TemporaryDirectory() as folder:
        for problem in packed_products.problems(torch.nn.ModuleList([held])):
            if problem in packed_experts._able:
                continue
            (made,) = packed_experts.certify([problem], 2048, Path(folder))
            said = {"passed": made.passed, "forms": [n for (n,) in made.algorithms], "seconds": made.seconds}
            tell(out, problem=str(problem), differ=made.evidence.differing, first=made.evidence.first, **said)


def compare(out, name, given):
    experts, top = SIZES[name]
    whole = routed(experts, top, ROWS[-1], 7)
    want = run(*given, *whole).clone()
    wrong = {}
    for rows in ROWS:
        for at in (0, ROWS[-1] - rows):
            got = run(*given, *(t[at : at + rows].contiguous() for t in whole))
            wrong[rows] = wrong.get(rows, 0) + bits.differing(got, want[at : at + rows])
    tell(out, shape=name, rows=list(ROWS), differ={rows: count for rows, count in wrong.items() if count})
    return want


def measure(out, name, layers, end):
    experts, top = SIZES[name]
    for tokens in TOKENS:
        if time.perf_counter() > end:
            return
        routings = 24 if tokens == 1 else 8 if tokens <= 8 else 4 if tokens <= 64 else 2
        given = [routed(experts, top, tokens, seed) for seed in range(routings)]
        ways = {}
        for kernel, (held, made, hidden) in layers.items():
            padded = [(torch.nn.functional.pad(x, (0, hidden - HIDDEN)), w, i) for x, w, i in given]
            ways[kernel] = [partial(made.apply, held, *each, None, None) for each in padded]
        us = dict(zip(ways, (round(t, 2) for t in timing.microseconds(list(ways.values()))), strict=True))
        ratios = {f"of {k}": round(us["bundled"] / us[k], 3) for k in us if k != "bundled"}
        tell(out, shape=name, tokens=tokens, us=us, **ratios)


def forms(out, name, held, end):
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    experts, top = SIZES[name]
    kernel = held.quant_method.moe_kernel.fused_experts
    parts = (held.w13_weight, kernel.w1_scale, HIDDEN, top), (held.w2_weight, kernel.w2_scale, INNER, 1)
    for tokens in FORMS_AT:
        if time.perf_counter() > end:
            return
        ids, found, wrong = tokens * top, {}, {}
        mean = ids / experts
        able = [f for f in four.FORMS_OF_EXPERTS + CANDIDATES if f.tiles >= 8 or mean <= 16 * f.tiles]
        able = [f for f in able if f.tiles <= 4 or mean >= f.tiles / 2]
        chosen = [routed(experts, top, tokens, seed)[2] for seed in range(24 if tokens == 1 else 4)]
        for data, scale, k, share in parts:
            packed = Packed(data, scale, None, 4, 32)
            x, o = torch.randn((ids // share, k), device="cuda").bfloat16(), packed.shape[0]
            to, want, ways = torch.empty((ids, o), device="cuda", dtype=torch.bfloat16), None, []
            for f in able:
                rows = [four.Rows(*moe_align_block_size(c, 8 * f.tiles, experts), share, ids) for c in chosen]
                ways.append([partial(four.product_of_experts, x, packed, r, None, f, to) for r in rows])
                ways[-1][0]()
                want = to.clone() if want is None else want
                wrong[f] = wrong.get(f, 0) + bits.differing(to, want)
            for f, us in zip(able, timing.microseconds(ways), strict=True):
                found.setdefault(f, []).append(round(us, 2))
        for f, us in found.items():
            tell(out, shape=name, tokens=tokens, form=list(f), us=us, differ=wrong[f])


def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("out")
    a.add_argument("--only", choices=("bits", "times"))
    a.add_argument("--shapes", default="gpt-oss-20b")
    a.add_argument("--forms", action="store_true")
    a.add_argument("--seconds", type=float, default=60.0)
    a = a.parse_args()
    end = started + a.seconds
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.fused_moe.oracle import mxfp4 as oracle
    from vllm.v1.worker import workspace

    oracle._user_moe_activation_override = lambda: None  # there is no model, and so no option of it
    machine.forbid_split_k()
    linear.define_op()
    config = VllmConfig()
    workspace.init_workspace_manager(torch.device("cuda"))
    with ThreadPoolExecutor(8) as pool:
        prepare = partial(four.prepare, group=32, zeros=False, dtype=torch.bfloat16, device=0)
        compiled = four.FORMS_OF_EXPERTS + (CANDIDATES if a.forms else ())
        list(pool.map(lambda f: prepare(f, experts=True, floats=True, tail=True), compiled[::-1]))
    print(f"{time.perf_counter() - started:.0f} s compiled", flush=True)
    with set_current_vllm_config(config), set_forward_context(None, config):
        for name in a.shapes.split(","):
            layers = {"bundled": layer("bundled", *SIZES[name])}
            certify(a.out, layers["bundled"][0])
            want = compare(a.out, name, layers["bundled"])
            if a.forms:
                forms(a.out, name, layers["bundled"][0], end)
            if a.only == "bits":
                continue
            for kernel in ("humming", "marlin"):
                try:
                    layers[kernel] = layer(kernel, *SIZES[name])
                    got = run(*layers[kernel], *routed(*SIZES[name], ROWS[-1], 7))
                    error = float((got.double() - want.double()).norm() / want.double().norm())
                    tell(a.out, shape=name, kernel=kernel, away=round(error, 6))
                except Exception as error:
                    layers.pop(kernel, None)
                    print(f"no {kernel}: {error!r}"[:400], flush=True)
            measure(a.out, name, layers, end)
            del layers
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
