"""Bits and times of the kernels of MLA, alone: decode by FlashAttention-MLA, prompts with up-projected keys and values.

    VLLM_BATCH_INVARIANT=1 PYTHONPATH=. python3 benchmarks/hopper/mla.py PARTS OUT.json   # vLLM 0.33, a Hopper GPU

PARTS: of layout, bits, decode, prompts, products, with commas. Times are of captured graphs, in microseconds per layer. "stock": up to 32 splits,
chosen from the batch. "one": one split. "N": as many splits as the row's position asks for, in parts of N blocks of 64
keys. Prompts: "stock" attends to a chunk and to its context separately, and merges both.
"""

# ruff: noqa: B023, E501

import json
import sys

import torch

LATENT, ROTARY, NOPE, VALUE = 512, 64, 128, 128
DTYPE = torch.bfloat16
ROWS = []


def note(**row):
    ROWS.append(row)
    print(json.dumps(row), flush=True)
    with open(sys.argv[2], "w") as file:
        json.dump({"device": torch.cuda.get_device_name(), "rows": ROWS}, file, indent=0)


def graph_us(calls, repeats=20):
    """Microseconds of one call: all calls in one captured graph, replayed."""
    for call in calls[:1]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return round(1000 * begin.elapsed_time(end) / repeats / len(calls), 2)


def decode_case(heads, number, context, page, layers):
    blocks = -(-context // page)
    caches = [torch.randn((number * blocks, page, LATENT + ROTARY), device="cuda", dtype=DTYPE) for _ in range(layers)]
    table = torch.randperm(number * blocks, device="cuda").to(torch.int32).reshape(number, blocks)
    q = torch.randn((number, heads, LATENT + ROTARY), device="cuda", dtype=DTYPE)
    lengths = torch.full((number,), context, dtype=torch.int32, device="cuda")
    return caches, table, q, lengths


def schedule(heads, lengths, context, page, splits, told=1, each=None):
    from vllm.v1.attention.backends.fa_utils import get_scheduler_metadata

    n = len(lengths)
    starts = torch.arange(n + 1, dtype=torch.int32, device="cuda")
    made = get_scheduler_metadata(
        batch_size=n, max_seqlen_q=told, max_seqlen_k=context, num_heads_q=heads, num_heads_kv=1, headdim=ROTARY,
        cache_seqlens=lengths, qkv_dtype=DTYPE, headdim_v=LATENT, page_size=page, cu_seqlens_q=starts, causal=True,
        num_splits=splits,
    )  # fmt: skip
    if each:
        wide = -(-n // 4) * 4
        blocks = -(-lengths // 64)
        made[wide : wide + n] = (-(-blocks // each)).clamp(1, splits)
    return starts, made


def flash(q, cache, table, lengths, context, starts, made, splits, told=1):
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q=q[..., LATENT:].contiguous(), k=cache[..., LATENT:].unsqueeze(-2),
        v=cache[..., :LATENT].unsqueeze(-2), q_v=q[..., :LATENT].contiguous(), max_seqlen_q=told, cu_seqlens_q=starts,
        max_seqlen_k=context, seqused_k=lengths, block_table=table, softmax_scale=0.07, causal=True, fa_version=3,
        scheduler_metadata=made, num_splits=splits,
    )  # fmt: skip


def layout():
    for n, heads in ((3, 16), (3, 128), (130, 16)):
        lengths = torch.tensor(([64, 640, 187] * n)[:n], dtype=torch.int32, device="cuda")
        for told in (1, 128):
            _, made = schedule(heads, lengths, 640, 64, 32, told)
            note(
                what="layout",
                n=n,
                heads=heads,
                told=told,
                size=len(made),
                begin=made[:24].tolist(),
                end=made[-4:].tolist(),
            )


def bits():
    from bi_patch.seams.cuda import mla_rows

    for heads, page in ((16, 64), (128, 64), (16, 16), (20, 64)):
        longest = 9000
        caches, table, _, _ = decode_case(heads, 1, longest, page, 1)
        rows = mla_rows.Rows(heads, LATENT, ROTARY, page, DTYPE, "cuda", longest)
        rows.check()
        generator = torch.Generator("cuda").manual_seed(1)
        q = torch.randn((longest, heads, LATENT + ROTARY), generator=generator, device="cuda").to(DTYPE) * 3

        def run(at):
            lengths = torch.tensor([a + 1 for a in at], dtype=torch.int32, device="cuda")
            step = rows.make(table.expand(len(at), -1).contiguous(), lengths, longest)
            out, first = [], 0
            for one in [step, *step.more]:
                count = len(one.seq_lens)
                some = q[torch.tensor(at[first : first + count], device="cuda")]
                out.append(
                    flash(
                        some,
                        caches[0],
                        one.block_table,
                        one.seq_lens,
                        longest,
                        one.query_start_loc,
                        one.scheduler_metadata,
                        mla_rows.MOST,
                    )
                )
                first += count
            return torch.cat(out)

        at = sorted({*range(0, 1100, 7), *range(63, longest, 331), 2047, 2048, 4095, 4096, longest - 1})
        alone = torch.cat([run([a]) for a in at])
        for what, batch in (
            ("all", at),
            ("reversed", at[::-1]),
            ("beside 800 short", None),
            ("1200 rows", None),
        ):
            if what == "beside 800 short":
                got = run(at + list(range(800)))[: len(at)]
            elif what == "1200 rows":
                got = run(at + list(range(1200)))[: len(at)]
            else:
                got = run(batch)
                got = got.flip(0) if what == "reversed" else got
            note(what=f"rows: {what}", heads=heads, page=page, differing=int((got != alone).sum()), of=got.numel())
        latents = caches[0][table[0].long()].flatten(0, 1).double()
        worst = 0.0
        for a in (5, 700, 4100, longest - 1):
            scores = (q[a].double() @ latents[: a + 1].T) * 0.07
            want = scores.softmax(-1) @ latents[: a + 1, :LATENT]
            worst = max(worst, float((run([a])[0].double() - want).abs().max()))
        note(what="rows: largest error against fp64", heads=heads, error=worst)


def decode():
    for heads in (16, 128):
        for number, context in (
            (1, 512),
            (1, 1100),
            (8, 1100),
            (64, 600),
            (128, 1100),
            (1, 4096),
            (8, 4096),
            (32, 4096),
            (2, 32000),
            (1, 32000),
            (64, 8192),
        ):
            bytes_each = number * context * 1152
            layers = max(2, min(12, (200 << 20) // bytes_each))
            caches, table, q, lengths = decode_case(heads, number, context, 64, layers)
            pe, nope = q[..., LATENT:].contiguous(), q[..., :LATENT].contiguous()
            ways = {"stock": (32, None), "one": (1, None)}
            ways |= {str(each): (32, each) for each in (1, 2, 4, 8, 16)}
            if context > 8192:
                ways["8 of 64"] = (64, 8)
                ways["4 of 128"] = (128, 4)
            times = {}
            for way, (splits, each) in ways.items():
                starts, made = schedule(heads, lengths, context, 64, splits, 1, each)
                from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

                def call(cache, starts=starts, made=made, splits=splits):
                    return flash_attn_varlen_func(
                        q=pe, k=cache[..., LATENT:].unsqueeze(-2), v=cache[..., :LATENT].unsqueeze(-2), q_v=nope,
                        max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=context, seqused_k=lengths,
                        block_table=table, softmax_scale=0.07, causal=True, fa_version=3, scheduler_metadata=made,
                        num_splits=splits,
                    )  # fmt: skip

                times[way] = graph_us([lambda c=c, f=call: f(c) for c in caches])
            note(what="decode us", heads=heads, number=number, context=context, **times)


def products():
    """The products by head, in microseconds: cuBLAS, upstream's kernel, and the bundled kernel in some tiles."""
    from vllm.model_executor.determinism.batch_invariant import bmm_batch_invariant

    from bi_patch.kernels.triton import heads as kernel

    for heads in (16, 128):
        for depth, cols in ((128, 512), (512, 128)):
            b = torch.randn((heads, depth, cols), device="cuda", dtype=DTYPE) * depth**-0.5
            for rows in (1, 8, 64, 128, 512):
                a = torch.randn((rows, heads, depth + 64), device="cuda", dtype=DTYPE)[..., :depth].transpose(0, 1)
                out = torch.empty((rows, heads, cols), device="cuda", dtype=DTYPE).transpose(0, 1)
                times = {"cuBLAS": graph_us([lambda: torch.bmm(a, b, out=out)] * 8)}
                want = out.clone()
                times["upstream"] = graph_us([lambda: bmm_batch_invariant(a, b, out=out)] * 8)
                for m in (16, 64):
                    for n in (32, 64, 128):
                        kernel.BLOCK_M, kernel.block_n = m, lambda *_, n=n: n
                        times[f"{m}x{n}"] = graph_us([lambda: kernel.product(a, b, out)] * 8)
                        times[f"{m}x{n} differ"] = int((out != want).sum())
                note(what="products us", heads=heads, depth=depth, cols=cols, rows=rows, **times)


class Impl:
    """The layer's sizes, for mla_prompts."""

    def __init__(self, heads):
        self.num_heads, self.kv_lora_rank, self.qk_nope_head_dim, self.v_head_dim = heads, LATENT, NOPE, VALUE
        self.qk_rope_head_dim, self.scale, self.kv_cache_dtype = ROTARY, 0.07, "auto"
        self.weight = torch.randn((heads * (NOPE + VALUE), LATENT), device="cuda", dtype=DTYPE) * LATENT**-0.5
        self.kv_b_proj = lambda x: (torch.nn.functional.linear(x, self.weight), None)

    def _concat_k_nope_k_pe(self, nope, pe):
        k = torch.empty((*nope.shape[:-1], NOPE + ROTARY), dtype=DTYPE, device="cuda")
        k[..., :NOPE], k[..., NOPE:] = nope, pe
        return k


def prompts():
    from types import SimpleNamespace

    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    from bi_patch.seams.cuda import mla_prompts, mla_samples

    for heads in (16, 128):
        impl = Impl(heads)
        layer = SimpleNamespace(impl=impl, head_size=LATENT + ROTARY, kv_lora_rank=LATENT)
        generator = torch.Generator("cuda").manual_seed(2)
        tokens = 3000
        q = torch.randn((tokens, heads, NOPE + ROTARY), generator=generator, device="cuda").to(DTYPE) * 3
        run = mla_samples.prepare_prompt(layer, 64, q, q[:, :1], q[:, :1])
        whole = run([(0, tokens)])
        for what, cuts in (
            ("chunks of 9", [(a, 9) for a in range(900, 990, 9)]),
            ("chunks of 64", [(a, min(64, tokens - a)) for a in range(0, tokens, 64)]),
            ("chunks of 129", [(a, min(129, tokens - a)) for a in range(0, tokens, 129)]),
            ("chunks of 1000", [(a, min(1000, tokens - a)) for a in range(0, tokens, 1000)]),
            ("one chunk of 1000 behind 2000", [(2000, 1000)]),
            ("single rows", [(a, 1) for a in range(0, tokens, 61)]),
            ("one row alone", [(tokens - 1, 1)]),
            ("a row beside two prompts", [(tokens - 1, 1), (0, 10), (0, 700)]),
        ):
            at = [r for a, n in cuts for r in range(a, a + n)]
            got = run(cuts)
            note(what=f"prompts: {what}", heads=heads, differing=int((got != whole[at]).sum()), of=got.numel())
        for new, context in (
            (512, 0),
            (1024, 0),
            (2048, 0),
            (8192, 0),
            (2048, 2048),
            (8192, 8192),
            (8192, 24000),
            (512, 31000),
        ):
            keys = new + context
            cache = torch.randn((-(-keys // 64), 64, LATENT + ROTARY), device="cuda", dtype=DTYPE)
            table = torch.randperm(len(cache), device="cuda").to(torch.int32)[None]
            workspace = torch.empty((65536, LATENT + ROTARY), device="cuda", dtype=DTYPE)
            latents, turned = (
                torch.randn((new, LATENT), device="cuda", dtype=DTYPE),
                torch.randn((new, 1, ROTARY), device="cuda", dtype=DTYPE),
            )
            q = torch.randn((new, heads, NOPE + ROTARY), device="cuda", dtype=DTYPE)
            out = torch.empty((new, heads * VALUE), device="cuda", dtype=DTYPE)
            group = mla_prompts.Group([mla_prompts.Segment(0, new, keys, 0)], table, workspace, "cuda")
            starts = torch.tensor([0, new], dtype=torch.int32, device="cuda")
            contexts = torch.tensor([0, context], dtype=torch.int32, device="cuda")
            sequences = torch.zeros(context, dtype=torch.int32, device="cuda")

            def ours():
                mla_prompts.attend(impl, q, latents, turned, cache, group, out)

            def stock():
                key, value = mla_prompts._project(impl, latents, turned)
                own = flash_attn_varlen_func(
                    q=q, k=key, v=value, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=new, max_seqlen_k=new,
                    softmax_scale=0.07, causal=True, return_softmax_lse=context > 0, fa_version=3,
                )  # fmt: skip
                if not context:
                    out.copy_(own.flatten(1))
                    return
                low, pe = mla_prompts._gather(impl, cache, workspace, table, contexts, sequences)
                key, value = mla_prompts._project(impl, low, pe)
                before, lse = flash_attn_varlen_func(
                    q=q, k=key, v=value, cu_seqlens_q=starts, cu_seqlens_k=contexts, max_seqlen_q=new,
                    max_seqlen_k=context, softmax_scale=0.07, causal=False, return_softmax_lse=True, fa_version=3,
                )  # fmt: skip
                merge_attn_states(
                    output=out.view(new, heads, VALUE), prefix_output=before, prefix_lse=lse, suffix_output=own[0],
                    suffix_lse=own[1],
                )  # fmt: skip

            note(
                what="prompt us",
                heads=heads,
                new=new,
                context=context,
                stock=graph_us([stock], 5),
                ours=graph_us([ours], 5),
            )


if __name__ == "__main__":
    with torch.inference_mode():
        for part in sys.argv[1].split(","):
            {"layout": layout, "bits": bits, "decode": decode, "prompts": prompts, "products": products}[part]()
