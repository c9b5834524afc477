"""Runs in a child process with TRITON_INTERPRET=1: vLLM's own Triton attention, prefill against decode.

The cases "window" and "alibi" run in the form "stock", and then in the form "closed", with what the seams
attention.cuda_empty_tiles and attention.cuda_alibi install. The scores have a mean of -4. So a row whose first tile is
fully masked shows at which maximum it restarts. Prints for each case and form how many rows differ, and how many rows
there are.
"""

import os
import types

os.environ |= {"TRITON_INTERPRET": "1", "BI_PATCH": "0", "VLLM_BATCH_INVARIANT": "1", "CUDA_VISIBLE_DEVICES": ""}

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton.backends  # noqa: E402
import triton.runtime.interpreter as interpreter  # noqa: E402

# vLLM's CPU build uses Triton only if Triton has a backend; the interpreter needs none.
driver = types.SimpleNamespace(is_active=lambda: True)
triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver)


def _dot(self, a, b, held, *rest):
    """Multiply in fp64: the bits of numpy's fp32 products depend on a row's place in the tile."""
    product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
    return interpreter.TensorHandle((product + held.data).astype(np.float32), held.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = _dot

from vllm.v1.attention.ops import triton_attention_helpers, triton_unified_attention  # noqa: E402

SIZE, HEADS, WINDOW, TOKENS, PAGE = 64, 2, 40, 150, 16


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attend(case, q, k, v, pages, length: int):
    """Attention of the last rows of `length` tokens; q [rows, HEADS, SIZE]."""
    out = torch.empty_like(q)
    triton_unified_attention.unified_attention(
        q=q,
        k=k,
        v=v,
        out=out,
        cu_seqlens_q=ints(0, len(q)),
        max_seqlen_q=len(q),
        seqused_k=ints(length),
        max_seqlen_k=TOKENS,
        softmax_scale=SIZE**-0.5,
        causal=True,
        window_size=(WINDOW - 1, 0) if case == "window" else (-1, -1),
        alibi_slopes=torch.tensor([0.3, 0.07]) if case == "alibi" else None,
        block_table=pages,
        softcap=0.0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
    )
    return out


def close() -> None:
    from bi_patch.kernels.triton.alibi import apply_alibi_to_score
    from bi_patch.kernels.triton.softmax import softmax_step

    for module in (triton_attention_helpers, triton_unified_attention):
        module.softmax_step, module.apply_alibi_to_score = softmax_step, apply_alibi_to_score


def compare(case: str, form: str) -> None:
    torch.manual_seed(0)
    blocks = -(-TOKENS // PAGE)
    q = torch.randn(TOKENS, HEADS, SIZE)
    k, v = (torch.randn(blocks, PAGE, HEADS, SIZE) for _ in range(2))
    q[..., 0], k[..., 0] = 8, -(SIZE**0.5) / 2
    q, k, v = (x.to(torch.float16) for x in (q, k, v))
    pages = torch.arange(blocks, dtype=torch.int32)[None]
    whole = attend(case, q, k, v, pages, TOKENS)
    beyond = range(WINDOW, TOKENS, 3)  # every place of a row in its page of 16, and in its tile
    differing = sum(not torch.equal(attend(case, q[i : i + 1], k, v, pages, i + 1)[0], whole[i]) for i in beyond)
    print("DIFFERING", case, form, differing, len(beyond))


if __name__ == "__main__":
    for form in ("stock", "closed"):
        if form == "closed":
            close()
        for case in ("window", "alibi"):
            compare(case, form)
