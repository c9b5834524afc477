"""Times and compares products of experts with packed weights of 4 bits on one GPU: vLLM's and the bundled kernels.

    PYTHONPATH=. python3 benchmarks/hopper/packed_experts.py OUT.json [--only SHAPE,...] [--tokens N,...] [--forms]

Each measurement is one line of the JSON file: the kernel, the shape, the number of tokens, and microseconds for the two
products of a layer, w13 and w2. Kernels of one shape and number of tokens are timed in turns, with the same experts for
each token; sorting the rows by expert is not timed. Of the bundled kernels, the form that serves, or all with --forms.
--no-triton leaves vLLM's Triton kernel out.
`differ`: outputs of all forms that differ from the dense product of each expert, in a smaller problem.
"""

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

os.environ.setdefault("VLLM_BATCH_INVARIANT", "0")
os.environ["BI_PATCH"] = "0"

import torch  # noqa: E402

from bi_patch.kernels.cuda import packed as four  # noqa: E402
from bi_patch.kernels.packing import Packed, pack_experts  # noqa: E402
from bi_patch.ops.cuda import timing  # noqa: E402

# Experts, experts of a token, and N and K of w13 and w2.
SHAPES = {
    "Qwen3-30B-A3B": (128, 8, (1536, 2048), (2048, 768)),
    "Mixtral-8x7B": (8, 2, (28672, 4096), (4096, 14336)),
}
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
GROUP = 128
BLOCKS = (8, 16, 32, 48, 64)  # rows of Marlin's tiles
_TRITON = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 8, "SPLIT_K": 1}  # invariant
lines, wrong, started = [], {}, time.perf_counter()


def tell(out, **row):
    import vllm

    lines.append(row)
    said = {"device": torch.cuda.get_device_name(), "vllm": vllm.__version__, "torch": torch.__version__}
    said |= {"date": time.strftime("%Y-%m-%d"), "differ": wrong, "rows": lines}
    Path(out).write_text(json.dumps(said, indent=1))


def random(generator, *shape):
    return torch.randint(0, 256, shape, generator=generator, device="cuda", dtype=torch.uint8)


def scales(generator, experts, n, k, group=GROUP):
    return torch.rand((experts, k // group, n), generator=generator, device="cuda").mul_(0.01).add_(0.002).bfloat16()


def sort(chosen, block, experts):
    from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size

    return moe_align_block_size(chosen, block, experts)


def compare(form):
    """How many outputs of a form differ from the dense product of each expert."""
    experts, n, k, top, tokens = 6, 272, 768, 2, 150
    g = torch.Generator("cuda").manual_seed(1)
    q = random(g, experts, n, k) % 16
    held = pack_experts(q, scales(g, experts, n, k).transpose(1, 2), None)
    x = torch.randn((tokens, k), generator=g, device="cuda").bfloat16()
    x[:, k // 2 :] = x[:, : k // 2].flip(1) * -1.03
    chosen = torch.rand((tokens, experts - 1), generator=g, device="cuda").topk(top).indices.to(torch.int32)
    out = torch.empty((tokens * top, n), dtype=x.dtype, device="cuda")
    four.product_of_experts(x, held, four.Rows(*sort(chosen, 8 * form.tiles, experts), top, len(out)), None, form, out)
    found = 0
    for expert in range(experts - 1):
        mine = (chosen.flatten() == expert).nonzero().flatten()
        own = held._replace(data=held.data.view(experts, -1)[expert].clone(), scale=held.scale[expert])
        want = four.product(x[mine // top], own, None, four.Form(4, 4, 8, True))
        found += int((want.view(torch.int16) != out[mine].view(torch.int16)).sum())
    return found


def layer(name):
    """Of each product of a layer: N, K, packed weights, Marlin's words, the Triton kernel's bytes and scales."""
    experts, _, *sizes = SHAPES[name]
    g = torch.Generator("cuda").manual_seed(2)
    for n, k in sizes:
        data, scale = random(g, experts * n * k // 2), scales(g, experts, n, k)
        words, plain = (
            data.clone().view(torch.int32).view(experts, k // 16, n * 2),
            data.clone().view(experts, n, k // 2),
        )
        yield n, k, Packed(data, scale, None, 4, GROUP), words, plain, scale.transpose(1, 2).contiguous()


def measure(a, name, held, tokens):
    import triton.language as tl
    import vllm._custom_ops as ops
    from vllm.model_executor.layers.fused_moe.fused_moe import invoke_fused_moe_wna16_triton_kernel as triton
    from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_make_workspace_new
    from vllm.scalar_type import scalar_types

    experts, top, *_ = SHAPES[name]
    ids, g = tokens * top, torch.Generator("cuda").manual_seed(tokens)
    routings = 32 if tokens == 1 else 16 if tokens <= 8 else 8 if tokens <= 256 else 2
    chosen = [
        torch.rand((tokens, experts), generator=g, device="cuda").topk(top).indices.int() for _ in range(routings)
    ]
    factors = torch.rand((ids,), generator=g, device="cuda")
    block = next((b for b in BLOCKS if ids / experts / b < 0.9), BLOCKS[-1])  # as vLLM chooses
    space = marlin_make_workspace_new(torch.device("cuda", torch.cuda.current_device()), 4)
    sorted_by = {}

    def rows(of):
        if of not in sorted_by:
            sorted_by[of] = [sort(c, of, experts) for c in chosen]
        return sorted_by[of]

    times: dict[tuple, list[float]] = {}
    for second, (n, k, packed, words, plain, plain_scale) in enumerate(held):
        share, by = (1, factors) if second else (top, None)
        x = torch.randn((ids // share, k), generator=g, device="cuda").bfloat16()
        out = torch.empty((ids, n), device="cuda", dtype=torch.bfloat16)

        def marlin(r, n=n, k=k, packed=packed, words=words, share=share, x=x, out=out, second=second):
            ops.moe_wna16_marlin_gemm(
                x, out, words, None, packed.scale, None, None, None, space, *r, factors, moe_block_size=block,
                top_k=share, mul_topk_weights=bool(second), b_q_type=scalar_types.uint4b8, size_m=len(x), size_n=n,
                size_k=k, use_atomic_add=False, use_fp32_reduce=True, is_zp_float=False,
            )  # fmt: skip

        def other(r, plain=plain, plain_scale=plain_scale, share=share, by=by, x=x, out=out, n=n):
            triton(
                x, plain, out.view(-1, share, n), plain_scale, None, by, *r, by is not None, share, _TRITON,
                compute_type=tl.bfloat16, use_int8_w8a16=False, use_int4_w4a16=True, block_shape=[0, GROUP],
            )  # fmt: skip

        def ours(r, form, packed=packed, share=share, by=by, x=x, out=out):
            four.product_of_experts(x, packed, four.Rows(*r, share, ids, by), None, form, out)

        serving = four.form_of_experts(ids, experts, n, k)
        forms = [f for f in four.FORMS_OF_EXPERTS if ids / experts <= 16 * f.tiles] if a.forms else [serving]
        ways = {("marlin",): [partial(marlin, r) for r in rows(block)]}
        if not a.no_triton:
            ways[("triton",)] = [partial(other, r) for r in rows(_TRITON["BLOCK_SIZE_M"])]
        ways |= {("bundled", *f): [partial(ours, r, f) for r in rows(8 * f.tiles)] for f in forms}
        for way, us in zip(ways, timing.microseconds(list(ways.values())), strict=True):
            times.setdefault(way if a.forms else way[:1], []).append(round(us, 2))
    for (kernel, *form), us in times.items():
        ratio = round(sum(us) / sum(times[("marlin",)]), 3)
        told = {"form": form} if form else {}
        tell(a.out, kernel=kernel, shape=name, tokens=tokens, us=us, of_marlin=ratio, **told)
        print(f"{time.perf_counter() - started:.0f} s", lines[-1], flush=True)


def main():
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("out")
    a.add_argument("--only", help="comma-separated shapes")
    a.add_argument("--tokens", default="", help="comma-separated numbers of tokens")
    a.add_argument("--forms", action="store_true", help="time every form, not only the one that serves")
    a.add_argument("--no-triton", action="store_true", help="leave vLLM's Triton kernel out")
    a = a.parse_args()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda form: four.prepare(form, GROUP, False, torch.bfloat16, 0, True), four.FORMS_OF_EXPERTS))
    wrong.update({str(tuple(form)): compare(form) for form in four.FORMS_OF_EXPERTS})
    print("outputs that differ:", wrong, flush=True)
    for name in a.only.split(",") if a.only else SHAPES:
        held = list(layer(name))
        for tokens in map(int, a.tokens.split(",")) if a.tokens else TOKENS:
            measure(a, name, held, tokens)
        del held
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
