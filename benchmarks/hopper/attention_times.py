"""Times vLLM's decode attention kernels in captured graphs, in microseconds per layer.

    VLLM_BATCH_INVARIANT=1 PYTHONPATH=. python3 benchmarks/hopper/attention_times.py OUT.json   # vLLM, a Hopper GPU

All cases have 32 query heads and 8 key heads. "stock" is FlashAttention 3 with up to 32 splits and a stated longest
query of 1. "one split" is FlashAttention 3 with one split. "told" is its stated longest query; with a long query, TMA
loads whole pages. Pages have 16 tokens unless the name says 128. "triton" serves layers with a window in an armed
engine; "bundled decode" serves single queries in other layers. Each layer has its own cache, so that K and V come from
memory and not from L2.
"""

import json
import sys
from functools import partial
from itertools import cycle, islice

import attention  # sets the environment
import stamp
from gemm import time_calls

HEADS, KEY_HEADS, CALLS = 32, 8, 12
LOADS = ((1, 576), (8, 1100), (64, 600), (256, 1100), (2, 32000))
WAYS = {
    "stock": {"told": 1, "page": 16, "splits": 32},
    "one split, told 1": {"told": 1, "page": 16, "splits": 1},
    "one split, told 16": {"told": 16, "page": 16, "splits": 1},
    "one split, told 128": {"told": 128, "page": 16, "splits": 1},
    "one split, told 1, pages of 128": {"told": 1, "page": 128, "splits": 1},
    "one split, told 128, pages of 128": {"told": 128, "page": 128, "splits": 1},
}


def caches(number: int, context: int, size: int, page: int):
    """K and V in pages for so many layers that L2 cannot hold all of them, and the table of pages."""
    import torch

    blocks = -(-context // page)
    bytes_each = 4 * number * blocks * page * KEY_HEADS * size
    layers = max(2, min(CALLS, (256 << 20) // bytes_each))
    shape = (number * blocks, page, KEY_HEADS, size)
    pairs = [[torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(layers)]
    table = torch.randperm(number * blocks, device="cuda").to(torch.int32).reshape(number, blocks)
    return pairs, table


def flash(q, pairs, table, starts, lengths, context, window, told, page, splits):
    from vllm.vllm_flash_attn.flash_attn_interface import get_scheduler_metadata

    schedule = get_scheduler_metadata(
        batch_size=len(lengths),
        max_seqlen_q=told,
        max_seqlen_k=context,
        num_heads_q=HEADS,
        num_heads_kv=KEY_HEADS,
        headdim=q.shape[-1],
        cache_seqlens=lengths,
        qkv_dtype=q.dtype,
        cu_seqlens_q=starts,
        page_size=page,
        causal=True,
        window_size=attention.edges(window),
        num_splits=splits,
    )
    return [
        partial(attention.flash, q, *pair, table, starts, lengths, told, window, 0.0, context, splits, schedule)
        for pair in calls(pairs)
    ]


def bundled(q, pairs, table, starts, lengths):
    import torch

    from bi_patch.kernels.cuda import decode

    out, scale = torch.empty_like(q), q.shape[-1] ** -0.5
    return [partial(decode.attend, q, *pair, out, starts, lengths, table, scale) for pair in calls(pairs)]


def triton(q, pairs, table, starts, lengths, window):
    return [partial(attention.triton, q, *pair, table, starts, lengths, 1, window, 0.0) for pair in calls(pairs)]


def calls(pairs):
    """The K and V of each of CALLS layers."""
    return islice(cycle(pairs), CALLS)


def main() -> None:
    import torch

    rows = []

    def keep(size, window, number, context, way, prepare) -> None:
        row = {"head": size, "window": window, "requests": number, "context": context, "way": way}
        try:
            row["us"] = round(time_calls(prepare()), 2)
        except Exception as error:  # a refusal by the library is a result too
            row["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        rows.append(row)
        print(row, flush=True)

    for size, window in ((64, 0), (128, 0), (128, 512)):
        for number, context in LOADS:
            q = torch.randn(number, HEADS, size, device="cuda", dtype=torch.bfloat16)
            starts = torch.arange(number + 1, device="cuda", dtype=torch.int32)
            lengths = torch.full((number,), context, device="cuda", dtype=torch.int32)
            held = {page: caches(number, context, size, page) for page in (16, 128)}
            ways = {
                way: partial(flash, q, *held[o["page"]], starts, lengths, context, window, **o)
                for way, o in WAYS.items()
                if not window or way == "stock"
            }
            if not window:
                ways["bundled decode"] = partial(bundled, q, *held[16], starts, lengths)
            ways["triton"] = partial(triton, q, *held[16], starts, lengths, window)
            for way, prepare in ways.items():
                keep(size, window, number, context, way, prepare)
    with open(sys.argv[1], "w") as file:
        json.dump({**stamp.head(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
