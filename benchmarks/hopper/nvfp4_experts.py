"""Compares and times a layer of experts in NVFP4 on one Hopper GPU: the bundled kernel, and vLLM's Marlin.

    PYTHONPATH=. python3 benchmarks/hopper/nvfp4_experts.py OUT.json [--only bits|times] [--forms] [--seconds 60]

Bits: the certificates of both products of a layer, every form against the widest one for several numbers of tokens,
rows of a layer among different numbers of rows, and a layer's distance from fp64. Times: a layer's two products with
what is around them, as vLLM's method runs them, on each kernel, with the same random weights and the same experts for
each token, in turns. Marlin is what vLLM takes without upstream's mode where Humming is not installed. --forms: times
of each form of the bundled kernel and of some others, the products alone.
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

SIZES = {"Qwen3-30B-A3B": (128, 8, 2048, 768)}  # experts, experts of a token, hidden and intermediate size
TOKENS = (1, 8, 64, 256, 4096)
ROWS = (1, 2, 3, 5, 8, 17, 33, 64, 129, 256, 513)
COMPARED = (1, 3, 8, 16, 40, 64, 130, 256, 777, 4096)  # tokens of which all forms are compared
FORMS_AT = (64, 256, 1, 8, 4096, 512, 128, 16, 32)  # tokens, the most important first
# Forms that do not serve, beside those that do.
CANDIDATES = (
    four.Form(2, 1, 3, blocks=2),
    four.Form(8, 1, 2, blocks=2),
    four.Form(4, 4, 2, blocks=2),
    four.Form(8, 4, 6, True),
    four.Form(16, 8, 4, True),
    four.Form(8, 16, 4, True),
)
SPREAD = 2.9  # of random floats e2m1
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BACKENDS = {"bundled": "auto", "marlin": "marlin"}
lines, started = [], time.perf_counter()


def tell(out, **row):
    import vllm

    lines.append(row)
    said = {"device": torch.cuda.get_device_name(), "vllm": vllm.__version__, "torch": torch.__version__}
    Path(out).write_text(json.dumps(said | {"date": time.strftime("%Y-%m-%d"), "rows": lines}, indent=1))
    print(f"{time.perf_counter() - started:.0f} s", row, flush=True)


def method(kernel, name):
    """vLLM's method for a layer on a kernel, and its configuration. Marlin is not in upstream's mode."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as module,
    )

    from bi_patch.seams.cuda import nvfp4_experts as seam

    experts, top, hidden, inner = SIZES[name]
    os.environ["VLLM_BATCH_INVARIANT"] = str(int(kernel == "bundled"))
    moe = expert_layers.config(experts, top, hidden, inner, "SILU", moe_backend=BACKENDS[kernel])
    select = module.select_nvfp4_moe_backend
    try:
        if kernel == "bundled":
            module.select_nvfp4_moe_backend = seam._chosen(select)
        return module.CompressedTensorsW4A4Nvfp4MoEMethod(moe, use_a16=True), moe
    finally:
        module.select_nvfp4_moe_backend = select


def floats(name):
    """Of each product of a layer: random words [E, n, k / 2], scales e4m3 [E, n, k / 16], and what divides, [E]."""
    experts, _, hidden, inner = SIZES[name]
    g = torch.Generator("cuda").manual_seed(experts)
    for part, n, k in (("w13", 2 * inner, hidden), ("w2", hidden, inner)):
        words = torch.randint(0, 256, (experts, n, k // 2), generator=g, device="cuda", dtype=torch.uint8)
        scale = (32 * (0.5 + torch.rand((experts, n, k // 16), generator=g, device="cuda"))).to(torch.float8_e4m3fn)
        by = 32 * SPREAD * k**0.5 * (0.75 + 0.5 * torch.rand(experts, generator=g, device="cuda"))
        yield part, words, scale, by


def layer(kernel, name):
    """A layer on a kernel, and its method."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_nvfp4 as module,
    )

    from bi_patch.seams.cuda import nvfp4_experts as seam

    experts, _, hidden, inner = SIZES[name]
    made, moe = method(kernel, name)
    more = {"layer_name": "experts", "hidden_size": hidden, "local_num_experts": experts}
    held = expert_layers.layer(made, moe, hidden, inner, **more)
    for part, words, scale, by in floats(name):
        getattr(held, f"{part}_weight_packed").data.copy_(words)
        getattr(held, f"{part}_weight_scale").data.copy_(scale)
        whole = getattr(held, f"{part}_weight_global_scale").data
        whole.copy_(by[:, None] if whole.ndim == 2 else by)
        getattr(held, f"{part}_input_global_scale").data.fill_(1.0)
    convert = module.convert_to_nvfp4_moe_kernel_format
    try:
        module.convert_to_nvfp4_moe_kernel_format = seam._packed(convert)
        made.process_weights_after_loading(held)
    finally:
        module.convert_to_nvfp4_moe_kernel_format = convert
    torch.cuda.empty_cache()
    return held, made


def routed(name, tokens, seed):
    experts, top, hidden, _ = SIZES[name]
    return expert_layers.routed(tokens, experts, top, hidden, tokens * 100 + seed)


def run(held, made, x, weights, ids):
    return made.apply(held, x, weights, ids, None, None)


def certify(out, held):
    """The certificates of the layer's two products. Without them the kernel does not serve."""
    from bi_patch.seams.cuda import packed_products

    with tempfile.TemporaryDirectory() as folder:
        for problem in packed_products.problems(torch.nn.ModuleList([held])):
            (made,) = packed_experts.certify([problem], 2048, Path(folder))
            said = {"passed": made.passed, "forms": [n for (n,) in made.algorithms], "seconds": made.seconds}
            tell(out, problem=str(problem), differ=made.evidence.differing, first=made.evidence.first, **said)


def compare(out, name, given):
    """Rows of a layer among different numbers of rows."""
    whole = routed(name, ROWS[-1], 7)
    want = run(*given, *whole).clone()
    wrong = {}
    for rows in ROWS:
        for at in (0, ROWS[-1] - rows):
            got = run(*given, *(t[at : at + rows].contiguous() for t in whole))
            wrong[rows] = wrong.get(rows, 0) + bits.differing(got, want[at : at + rows])
    tell(out, shape=name, rows=list(ROWS), differ={rows: count for rows, count in wrong.items() if count})
    return want


def dequantized(words, scale, by):
    """An expert's weights in fp64 [n, k]."""
    q = torch.stack((words & 15, words >> 4), -1).flatten(-2).long()
    value = torch.tensor(VALUES, dtype=torch.float64, device="cuda")[q & 7] * torch.where(q > 7, -1, 1)
    return value * scale.double().repeat_interleave(16, 1) / by.double()


def away(out, name, given, tokens=37, kernel="bundled"):
    """A layer's distance from fp64 with the roundings of its 16-bit values, as a part of the output's size."""
    experts, _, hidden, _ = SIZES[name]
    (_, *first), (_, *second) = floats(name)
    x, weights, ids = routed(name, tokens, 3)
    want = torch.zeros((tokens, hidden), dtype=torch.float64, device="cuda")
    for expert in range(experts):
        by = (weights * (ids == expert)).sum(1, keepdim=True).double()
        up = (x.double() @ dequantized(*(t[expert] for t in first)).T).bfloat16().double()
        gate, up = up.chunk(2, -1)
        inner = (torch.nn.functional.silu(gate).bfloat16().double() * up).bfloat16().double()
        want += (inner @ dequantized(*(t[expert] for t in second)).T) * by
    got = run(*given, x, weights, ids).double()
    tell(out, shape=name, kernel=kernel, tokens=tokens, away=round(float((got - want).norm() / want.norm()), 6))


def products(name, held):
    """Of each product: packed weights, K, and how many ids share a row of x."""
    _, top, hidden, inner = SIZES[name]
    kernel = held.quant_method.moe_kernel.fused_experts
    yield Packed(held.w13_weight, kernel.w1_scale, None, 4, 16, kernel.g1_alphas), hidden, top
    yield Packed(held.w2_weight, kernel.w2_scale, None, 4, 16, kernel.g2_alphas), inner, 1


def forms(out, name, held, at, end, timed):
    """Each form's outputs against those of the widest form, and with `timed` its microseconds."""
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    experts, top, *_ = SIZES[name]
    for tokens in at:
        if time.perf_counter() > end:
            return
        ids, found, wrong = tokens * top, {}, {}
        number = 1 if not timed else 24 if tokens == 1 else 4
        chosen = [routed(name, tokens, seed)[2] for seed in range(number)]
        factors = torch.rand((ids,), device="cuda")
        widest = max(four.FORMS_OF_EXPERTS, key=lambda form: (form.wide, form.tiles))
        able = four.FORMS_OF_EXPERTS
        if timed:
            mean = ids / experts
            able = [f for f in able + CANDIDATES if mean <= 16 * f.tiles or f.tiles >= 8]
            able = [f for f in able if f.tiles <= 4 or mean >= f.tiles / 2]
        able = [widest, *(f for f in able if f != widest)]
        for packed, k, share in products(name, held):
            x = torch.randn((ids // share, k), device="cuda").bfloat16()
            x[:, k // 2 :] = x[:, : k // 2].flip(1) * -1.03  # sums that cancel show another order
            to, want, ways = torch.empty((ids, packed.shape[0]), device="cuda", dtype=torch.bfloat16), None, []
            for f in able:
                rows = [
                    four.Rows(
                        *moe_align_block_size(c, 8 * f.tiles, experts), share, ids, factors if share == 1 else None
                    )
                    for c in chosen
                ]
                ways.append([partial(four.product_of_experts, x, packed, r, None, f, to) for r in rows])
                to.fill_(torch.nan)
                ways[-1][0]()
                want = to.clone() if want is None else want
                wrong[f] = wrong.get(f, 0) + bits.differing(to, want) + int(to.isnan().sum())
            if timed:
                for f, us in zip(able, timing.microseconds(ways), strict=True):
                    found.setdefault(f, []).append(round(us, 2))
        if not timed:
            tell(out, shape=name, tokens=tokens, differ={str(tuple(f)): n for f, n in wrong.items()})
        for f, us in found.items():
            tell(out, shape=name, tokens=tokens, form=list(f), us=us, differ=wrong[f])


def measure(out, name, layers, end):
    for tokens in TOKENS:
        if time.perf_counter() > end:
            return
        routings = 24 if tokens == 1 else 8 if tokens <= 8 else 4 if tokens <= 64 else 2
        given = [routed(name, tokens, seed) for seed in range(routings)]
        ways = {kernel: [partial(run, *held, *each) for each in given] for kernel, held in layers.items()}
        us = dict(zip(ways, (round(t, 2) for t in timing.microseconds(list(ways.values()))), strict=True))
        ratios = {f"of {kernel}": round(us["bundled"] / us[kernel], 3) for kernel in us if kernel != "bundled"}
        tell(out, shape=name, tokens=tokens, us=us, **ratios)


def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("out")
    a.add_argument("--only", choices=("bits", "times"))
    a.add_argument("--forms", action="store_true")
    a.add_argument("--seconds", type=float, default=60.0)
    a = a.parse_args()
    end = started + a.seconds
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.v1.worker import workspace

    machine.forbid_split_k()
    linear.define_op()
    config = VllmConfig()
    workspace.init_workspace_manager(torch.device("cuda"))
    with ThreadPoolExecutor(8) as pool:
        prepare = partial(four.prepare, group=16, zeros=False, dtype=torch.bfloat16, device=0)
        compiled = four.FORMS_OF_EXPERTS + (CANDIDATES if a.forms else ())
        list(pool.map(lambda f: prepare(f, experts=True, floats=True), compiled[::-1]))
    print(f"{time.perf_counter() - started:.0f} s compiled", flush=True)
    with set_current_vllm_config(config), set_forward_context(None, config):
        for name in SIZES:
            layers = {"bundled": layer("bundled", name)}
            certify(a.out, layers["bundled"][0])
            if a.only != "times":
                compare(a.out, name, layers["bundled"])
                away(a.out, name, layers["bundled"])
                forms(a.out, name, layers["bundled"][0], COMPARED, end, False)
            if a.only != "bits":
                try:
                    layers["marlin"] = layer("marlin", name)
                    away(a.out, name, layers["marlin"], kernel="marlin")
                except Exception as error:
                    layers.pop("marlin", None)
                    print(f"no Marlin: {error!r}"[:600], flush=True)
                measure(a.out, name, layers, end)
            if a.forms:
                forms(a.out, name, layers["bundled"][0], FORMS_AT, end, True)


if __name__ == "__main__":
    main()
