"""Bits of the kernels of sparse MLA (DeepSeek V3.2), alone: scores of the indexer, the choice of tokens, attention.

    PYTHONPATH=. python3 benchmarks/hopper/sparse.py PARTS OUT.json   # vLLM 0.33, a Hopper GPU

PARTS: of scores, choice, attention, with commas. A row is compared alone and in company, as a prompt and as a decode
step. "in another order": the same tokens are chosen, and attention would add them in another order.
"""

import json
import sys
import traceback

import torch

HEADS, SIZE, PAGE, CHOSEN, TOKENS = 64, 128, 64, 2048, 6000
LATENT, ROTARY = 512, 64
ROWS = []


def note(**row):
    ROWS.append(row)
    print(json.dumps(row), flush=True)
    with open(sys.argv[2], "w") as file:
        json.dump({"device": torch.cuda.get_device_name(), "rows": ROWS}, file, indent=0)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def differing(a, b) -> int:
    return int((a.view(torch.int32) != b.view(torch.int32)).sum())


def scores():
    """The indexer's scores of one row, by the kernel of prompts and by that of decode steps."""
    from vllm import _custom_ops as ops
    from vllm.utils import deep_gemm

    torch.manual_seed(1)
    k = torch.randn((TOKENS, SIZE), device="cuda", dtype=torch.bfloat16)
    pages = -(-TOKENS // PAGE)
    order = torch.randperm(pages, device="cuda")
    at = torch.arange(TOKENS, device="cuda")
    cache = torch.zeros((pages, PAGE, SIZE + 4), dtype=torch.uint8, device="cuda")
    ops.indexer_k_quant_and_cache(k, cache, order[at // PAGE] * PAGE + at % PAGE, SIZE, "ue8m0")
    table = order.to(torch.int32)[None]
    keys = torch.empty((TOKENS, SIZE), dtype=torch.float8_e4m3fn, device="cuda")
    scales = torch.empty((TOKENS, 4), dtype=torch.uint8, device="cuda")
    ops.cp_gather_indexer_k_quant_cache(cache, keys, scales, table, ints(0, TOKENS))
    q = torch.randn((TOKENS, HEADS, SIZE), device="cuda").to(torch.float8_e4m3fn)
    weights = torch.randn((TOKENS, HEADS), device="cuda") * HEADS**-0.5

    def prompt(rows):
        """Scores of rows (positions) as a chunk of a prompt."""
        ends = (rows + 1).to(torch.int32)
        held = (keys, scales.view(torch.float32).squeeze(-1))
        made = deep_gemm.fp8_fp4_mqa_logits(
            (q[rows], None), held, weights[rows], torch.zeros_like(ends), ends, int(ends.max())
        )
        return [made[i, : int(end)].float() for i, end in enumerate(ends)]

    def step(rows):
        """Scores of rows as single tokens of as many requests."""
        lengths = (rows + 1).to(torch.int32)[:, None]
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        plan = deep_gemm.get_paged_mqa_logits_metadata(lengths, PAGE, sms)
        made = deep_gemm.fp8_fp4_paged_mqa_logits(
            (q[rows][:, None], None),
            cache.unsqueeze(-2),
            weights[rows],
            lengths,
            table.expand(len(rows), -1).contiguous(),
            plan,
            max_model_len=8192,
        )
        return [made[i, : int(row) + 1].float() for i, row in enumerate(rows)]

    asked = torch.tensor([100, 2047, 2048, 3001, 4999, TOKENS - 1], device="cuda")
    whole = prompt(at)
    want = [whole[int(row)] for row in asked]
    ways = {
        "prompt, row alone": lambda: [prompt(row[None])[0] for row in asked],
        "prompt, rows together": lambda: prompt(asked),
        "prompt, chunks of 9": lambda: [prompt(torch.arange(r - 8, r + 1, device="cuda"))[8] for r in asked.tolist()],
        "decode, row alone": lambda: [step(row[None])[0] for row in asked],
        "decode, rows together": lambda: step(asked),
        "decode, beside 122 rows": lambda: step(torch.cat([asked, at[50:4000:33][:122]]))[: len(asked)],
    }
    for what, call in ways.items():
        got = call()
        note(
            what=f"scores: {what}, against the whole prompt",
            differing=sum(differing(a, b) for a, b in zip(got, want, strict=True)),
            of=sum(map(len, want)),
            finite=all(bool(torch.isfinite(a).all()) for a in got),
        )


def choice():
    """The tokens that each kernel chooses, for scores with and without ties."""
    from vllm import _custom_ops as ops

    space = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")

    def kernel(name):
        def call(logits, lengths):
            out = torch.full((len(logits), CHOSEN), -1, dtype=torch.int32, device="cuda")
            if name == "prompts":
                zero = torch.zeros_like(lengths)
                ops.top_k_per_row_prefill(logits, zero, lengths, out, len(logits), *logits.stride(), CHOSEN)
            elif name == "per row":
                ops.top_k_per_row_decode(logits, 1, lengths, out, len(logits), *logits.stride(), CHOSEN)
            else:
                run = getattr(torch.ops._C, f"{name}_topk")
                run(logits, lengths[:, None], out, space, CHOSEN, int(lengths.max()))
            return out

        return call

    torch.manual_seed(2)
    for data in ("distinct", "tied"):
        base = torch.randn((64, 8192), device="cuda")
        if data == "tied":
            base = (base * 8).round() / 8
        lengths = torch.randint(3000, 8192, (64,), device="cuda", dtype=torch.int32)
        masked = base.masked_fill(torch.arange(8192, device="cuda") >= lengths[:, None], float("-inf"))
        first = masked.sort(dim=-1, descending=True, stable=True).indices[:, :CHOSEN].sort(-1).values
        for name in ("prompts", "per row", "cooperative", "persistent"):
            try:
                call = kernel(name)
                runs = [call(base, lengths) for _ in range(3)]
                runs.append(torch.cat([call(base[i : i + 1], lengths[i : i + 1]) for i in range(64)]))
                runs.append(call(base.repeat(3, 1), lengths.repeat(3))[:64] if name != "cooperative" else runs[0])
                sets = [run.sort(-1).values for run in runs]
                note(
                    what=f"choice: {name}, {data} scores",
                    rows=64,
                    rows_not_the_first_of_ties=int((sets[0] != first).any(-1).sum()),
                    rows_with_other_tokens_in_a_second_run=int((sets[0] != sets[1]).any(-1).sum()),
                    rows_with_other_tokens_alone=int((sets[0] != sets[3]).any(-1).sum()),
                    rows_with_other_tokens_among_192=int((sets[0] != sets[4]).any(-1).sum()),
                    rows_in_another_order_in_a_second_run=int((runs[0] != runs[1]).any(-1).sum()),
                    rows_in_another_order_alone=int((runs[0] != runs[3]).any(-1).sum()),
                )
            except Exception as error:  # a kernel that this GPU lacks
                note(what=f"choice: {name}, {data} scores", error=str(error)[:300])


def attention():
    """FlashAttention-MLA over chosen tokens (pages of one token): in another order, in company, and in parts that the
    row's own number of tokens decides."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    from bi_patch.seams.cuda import mla_rows

    for heads in (16, 128):
        torch.manual_seed(3)
        rows = 96
        held = torch.randn((TOKENS, LATENT + ROTARY), device="cuda", dtype=torch.bfloat16)
        q = torch.randn((rows, heads, LATENT + ROTARY), device="cuda", dtype=torch.bfloat16)
        counts = torch.randint(1, CHOSEN + 1, (rows,), device="cuda", dtype=torch.int32)
        counts[::2] = CHOSEN
        table = torch.stack([torch.randperm(TOKENS, device="cuda")[:CHOSEN].sort().values for _ in range(rows)]).int()
        made = mla_rows.Rows(heads, LATENT, ROTARY, 1, torch.bfloat16, torch.device("cuda"), CHOSEN)

        def call(at, blocks, ours, heads=heads, q=q, held=held, counts=counts, made=made):
            some, lengths = q[at], counts[at]
            more = {}
            if ours:
                step = made.make(blocks, lengths, CHOSEN)
                more = {"scheduler_metadata": step.scheduler_metadata, "num_splits": mla_rows.MOST}
            return flash_attn_varlen_func(
                q=some[..., LATENT:].contiguous(),
                k=held[:, LATENT:].unsqueeze(1).unsqueeze(1),
                v=held[:, :LATENT].unsqueeze(1).unsqueeze(1),
                q_v=some[..., :LATENT].contiguous(),
                max_seqlen_q=1,
                cu_seqlens_q=torch.arange(len(some) + 1, dtype=torch.int32, device="cuda"),
                max_seqlen_k=CHOSEN,
                seqused_k=lengths,
                block_table=blocks,
                softmax_scale=0.07,
                causal=True,
                fa_version=3,
                **more,
            )

        for ours in (False, True):
            every = torch.arange(rows, device="cuda")
            want = call(every, table, ours)
            turned = torch.where(torch.arange(CHOSEN, device="cuda") < counts[:, None], table, table)
            for i, count in enumerate(counts.tolist()):
                turned[i, :count] = table[i, :count].flip(0)
            alone = torch.cat([call(every[i : i + 1], table[i : i + 1], ours) for i in range(rows)])
            few = torch.cat([call(every[i : i + 6], table[i : i + 6], ours) for i in range(0, rows, 6)])
            for what, got in (("alone", alone), ("six together", few), ("in another order", call(every, turned, ours))):
                note(
                    what=f"attention: {what}, {'parts by the row' if ours else 'parts by the batch'}",
                    heads=heads,
                    rows=rows,
                    rows_differing=int((got != want).flatten(1).any(1).sum()),
                )


if __name__ == "__main__":
    with torch.inference_mode():
        for part in sys.argv[1].split(","):
            try:
                {"scores": scores, "choice": choice, "attention": attention}[part]()
            except Exception:
                note(what=part, error=traceback.format_exc()[-900:])
