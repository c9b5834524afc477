"""Tests whether vLLM's attention kernels give a decoded token the bits of the same token prefilled.

    VLLM_BATCH_INVARIANT=1 PYTHONPATH=. python3 benchmarks/hopper/attention.py     # needs vLLM and a Hopper GPU

The kernels are FlashAttention 3 with one split, and Triton's unified attention as upstream's mode runs it. Cases differ
in head size, query heads per key head, window, soft cap and page size. For several lengths, the script prefills a
prompt. It compares the last query's output with that of the same query alone ("alone") and in a batch of five
("batch"). It also compares the second half of the prompt with the same half as one chunk ("half"). Each case prints one
line: the elements equal in every bit, out of all elements.

"told" is the longest query that the caller states: stock vLLM states 1, bi_patch's seam 128. "low" marks scores with a
mean of -4. There, a query row whose window begins later than its neighbours' can meet a fully masked tile first. Before
vLLM 0.33, the kernel then restarted the row's running maximum at 0. --closed installs bi_patch's step in its place.
"""

import itertools
import json
import os
import sys

import stamp

os.environ["BI_PATCH"] = "0"
os.environ["VLLM_BATCH_INVARIANT"] = "1"
TOKENS = (100, 129, 300, 513, 700, 2000, 5003)


def edges(window: int) -> list[int]:
    """FlashAttention's window_size for a causal window of `window` tokens; 0 means no window."""
    return [window - 1, 0] if window else [-1, -1]


def flash(q, k, v, pages, starts, lengths, longest_q, window, cap, longest_k=8192, splits=1, schedule=None):
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=starts,
        max_seqlen_q=longest_q,
        seqused_k=lengths,
        max_seqlen_k=longest_k,
        softmax_scale=q.shape[-1] ** -0.5,
        causal=True,
        window_size=edges(window),
        block_table=pages,
        fa_version=3,
        num_splits=splits,
        softcap=cap,
        scheduler_metadata=schedule,
    )


def triton(q, k, v, pages, starts, lengths, longest_q, window, cap):
    import torch
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    out = torch.empty_like(q)
    unified_attention(
        q=q,
        k=k,
        v=v,
        out=out,
        cu_seqlens_q=starts,
        max_seqlen_q=longest_q,
        seqused_k=lengths,
        max_seqlen_k=8192,
        softmax_scale=q.shape[-1] ** -0.5,
        causal=True,
        window_size=(window - 1, 0) if window else (-1, -1),
        block_table=pages,
        softcap=cap,
        q_descale=None,
        k_descale=None,
        v_descale=None,
    )
    return out


def case(attend, size, group, window, cap, page, told, low=False) -> str:
    import torch

    same = dict.fromkeys(("alone", "batch", "half"), (0, 0))

    def count(kind, a, b):
        agree, of = same[kind]
        same[kind] = (agree + int((a == b).sum()), of + a.numel())

    def tensor(values):
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    for n in TOKENS:
        torch.manual_seed(n)
        blocks = -(-n // page)
        q = torch.randn(n, 2 * group, size, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(5 * blocks, page, 2, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        if low:
            q[..., 0], k[..., 0] = 8, -(size**0.5) / 2
        table = torch.arange(5 * blocks, dtype=torch.int32, device="cuda").reshape(5, blocks)

        def run(rows, pages, starts, lengths, longest):
            return attend(rows, k, v, pages, tensor(starts), tensor(lengths), max(longest, told), window, cap)  # noqa: B023

        whole = run(q, table[:1], [0, n], [n], n)
        count("alone", run(q[-1:], table[:1], [0, 1], [n], 1)[0], whole[-1])
        others = torch.randn(4, 2 * group, size, device="cuda", dtype=torch.bfloat16)
        rows = torch.cat([others[:2], q[-1:], others[2:]])
        order = table[[1, 2, 0, 3, 4]]
        count("batch", run(rows, order, list(range(6)), [7, n // 2 + 1, n, n, 33], 1)[2], whole[-1])
        count("half", run(q[n // 2 :], table[:1], [0, n - n // 2], [n], n - n // 2), whole[n // 2 :])
    return " ".join(f"{kind} {agree}/{of}" for kind, (agree, of) in same.items())


def close() -> None:
    """Install bi_patch's softmax step, as the seam attention.cuda_empty_tiles does."""
    from vllm.v1.attention.ops import triton_attention_helpers, triton_unified_attention

    from bi_patch.kernels.triton.softmax import softmax_step

    triton_attention_helpers.softmax_step = triton_unified_attention.softmax_step = softmax_step


def main() -> None:
    print(json.dumps(stamp.head()), flush=True)
    if "--closed" in sys.argv[1:]:
        close()
    for name, attend in (("flash", flash), ("triton", triton)):
        sizes = (64, 80, 96, 112, 128, 192, 256) if name == "flash" else (64, 80, 128, 256)
        for size, group, window, cap, page in itertools.product(sizes, (1, 4, 7), (0, 512), (0.0, 30.0), (16, 128)):
            rare = (group == 7) + (cap > 0) + (page == 128)
            if rare > 1 or (name == "flash" and window and rare):
                continue
            lows = (False, True) if name == "triton" and window and not rare else (False,)
            for told, low in itertools.product((1, 128) if name == "flash" and size == 64 else (1,), lows):
                head = f"{name} head {size} group {group} window {window} cap {cap:g} page {page} told {told}"
                head += " low:" if low else ":"
                try:
                    print(head, case(attend, size, group, window, cap, page, told, low), flush=True)
                except Exception as error:  # a refusal by the library is a result too
                    print(head, type(error).__name__, str(error).splitlines()[0], flush=True)


if __name__ == "__main__":
    sys.exit(main())
