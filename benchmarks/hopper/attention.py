"""Asks FlashAttention 3 alone: does a token decoded give the bits of the same token prefilled, by head size and window?

    python3 benchmarks/hopper/attention.py        # needs vLLM's vllm_flash_attn and a Hopper GPU

For one sequence with paged keys and values, the last query's output of a prefill of n tokens is compared with the
output of that query alone, as the longest query and context told to the library change. One line per case, with the
count of elements that agree in every bit.
"""

import itertools
import os

os.environ["BI_PATCH"] = "0"
PAGE = 16
TOKENS = (100, 129, 300, 513, 700, 2000)


def main() -> None:
    import torch
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    def run(q, k, v, pages, n, longest_q, longest_k, window):
        rows = q.shape[0]
        return flash_attn_varlen_func(
            q=q, k=k, v=v,
            cu_seqlens_q=torch.tensor([0, rows], dtype=torch.int32, device="cuda"), max_seqlen_q=longest_q,
            seqused_k=torch.tensor([n], dtype=torch.int32, device="cuda"), max_seqlen_k=longest_k,
            softmax_scale=q.shape[-1] ** -0.5, causal=True, window_size=[window - 1, 0] if window else [-1, -1],
            block_table=pages, fa_version=3, num_splits=1,
        )  # fmt: skip

    for size, window, n in itertools.product((64, 96, 128, 256), (0, 512), TOKENS):
        torch.manual_seed(n)
        count = -(-n // PAGE)
        q = torch.randn(n, 8, size, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(count, PAGE, 2, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        pages = torch.arange(count, dtype=torch.int32, device="cuda")[None]
        whole = run(q, k, v, pages, n, n, n, window)
        line = [f"head {size} window {window} tokens {n}:"]
        for longest_q, longest_k in ((1, n), (2, n), (64, n), (512, n), (512, 32768)):
            alone = run(q[-1:], k, v, pages, n, longest_q, longest_k, window)
            line.append(f"q<={longest_q} k<={longest_k} {int((alone[0] == whole[-1]).sum())}/{alone.numel()}")
        half = run(q[n // 2 :], k, v, pages, n, n - n // 2, n, window)
        line.append(f"second half {int((half == whole[n // 2 :]).sum())}/{half.numel()}")
        print(" ".join(line), flush=True)


if __name__ == "__main__":
    main()
