"""Runs in a child process with TRITON_INTERPRET=1: vLLM's Triton-MLA kernel on e4m3 latents, as mla_eighths calls it.

Prints how many rows differ between alone and in company, how many there are, and the largest error against fp64.
"""

import os
import types

os.environ |= {"TRITON_INTERPRET": "1", "BI_PATCH": "0", "CUDA_VISIBLE_DEVICES": ""}

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

from bi_patch.seams.cuda import mla_eighths  # noqa: E402

LATENT, ROTARY, PAGE, HEADS, SCALE = 512, 64, 16, 3, 0.05
LENGTHS = (1, 15, 16, 33, 130, 301, 2, 64)


def attend(q, cache, table, lengths):
    one = torch.ones((), dtype=torch.float32)
    layer = types.SimpleNamespace(kv_lora_rank=LATENT, impl=types.SimpleNamespace(scale=SCALE), _k_scale=one)
    return mla_eighths.attend(layer, q, cache, table, lengths)


def exact(q, latents):
    scores = torch.einsum("hd,td->ht", q.double(), latents.double()) * SCALE
    return scores.softmax(-1) @ latents[:, :LATENT].double()


def main() -> None:
    torch.manual_seed(0)
    rows, pages = len(LENGTHS), -(-max(LENGTHS) // PAGE)
    wide = torch.randn(rows * pages, PAGE, LATENT + ROTARY)
    cache = wide.to(torch.float8_e4m3fn)
    q = torch.randn(rows, HEADS, LATENT + ROTARY).to(torch.float16)
    table = torch.randperm(rows * pages).to(torch.int32).view(rows, pages)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    whole = attend(q, cache, table, lengths)
    alone = torch.cat([attend(q[i : i + 1], cache, table[i : i + 1], lengths[i : i + 1]) for i in range(rows)])
    turned = attend(q.flip(0), cache, table.flip(0), lengths.flip(0)).flip(0)
    differing = [int((x != whole).flatten(1).any(1).sum()) for x in (alone, turned)]
    errors = []
    for i, length in enumerate(LENGTHS):
        latents = cache[table[i].long()].float().flatten(0, 1)[:length]
        errors.append(float((exact(q[i], latents) - whole[i].double()).abs().max()))
    padded = attend(q[:1], cache, table[:1], torch.zeros(1, dtype=torch.int32))
    print("LATENT", sum(differing), 2 * rows, max(errors), bool(torch.isfinite(padded).all()))


if __name__ == "__main__":
    main()
