"""Times attention of several new tokens per request, as a step that checks drafts has them; microseconds per layer.

    VLLM_BATCH_INVARIANT=1 PYTHONPATH=. python3 benchmarks/hopper/verify_times.py OUT.json   # vLLM, a Hopper GPU

All cases have 32 query heads and 8 key heads of 128. "stock" is FlashAttention 3 with up to 32 splits, "one split" is
prefill's kernel with one split, "bundled" is the bundled decode kernel. Its elements that differ from "one split" are
counted. Each layer has its own cache, so that K and V come from memory and not from L2.
"""

import json
import sys
from functools import partial

import attention_times as times  # sets the environment
import stamp
from gemm import time_calls

SIZE = 128
LOADS = ((1, 600), (8, 1100), (16, 600), (64, 600), (4, 8000), (2, 32000))
TOKENS = (1, 2, 5, 9, 17)


def bundled(q, out, pairs, table, starts, lengths):
    from bi_patch.kernels.cuda import decode

    return [partial(decode.attend, q, *pair, out, starts, lengths, table, SIZE**-0.5) for pair in times.calls(pairs)]


def main() -> None:
    import torch

    rows = []
    for number, context in LOADS:
        pairs, table = times.caches(number, context, SIZE, 16)
        lengths = torch.full((number,), context, device="cuda", dtype=torch.int32)
        for tokens in TOKENS:
            q = torch.randn(number * tokens, times.HEADS, SIZE, device="cuda", dtype=torch.bfloat16)
            out = torch.empty_like(q)
            starts = torch.arange(0, number * tokens + 1, tokens, device="cuda", dtype=torch.int32)
            flash = partial(times.flash, q, pairs, table, starts, lengths, context, 0, tokens, 16)
            ways = {
                "stock": partial(flash, 32),
                "one split": partial(flash, 1),
                "bundled": partial(bundled, q, out, pairs, table, starts, lengths),
            }
            row = {"requests": number, "context": context, "tokens": tokens}
            for way, prepare in ways.items():
                try:
                    row[way] = round(time_calls(prepare()), 2)
                except Exception as error:  # a refusal by the library is a result too
                    row[way] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            try:
                bundled(q, out, pairs, table, starts, lengths)[0]()
                want = flash(1)[0]()
                want = want[0] if isinstance(want, tuple) else want
                row["differing"] = int((want.reshape(out.shape).view(torch.int16) != out.view(torch.int16)).sum())
            except Exception as error:
                row["differing"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            rows.append(row)
            print(row, flush=True)
            with open(sys.argv[1], "w") as file:
                json.dump({**stamp.head(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
