"""Runs in a child process: compiles vLLM's own Triton attention, as the engine calls it, for GPUs that are not here.

Arguments: compute capabilities, e.g. 80 120. Prints "COMPILED <capability> <kind> <bytes of shared memory>".
"""

import os
import sys
import types

os.environ |= {"BI_PATCH": "0", "VLLM_BATCH_INVARIANT": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch  # noqa: E402
import triton  # noqa: E402
import triton.backends  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

# vLLM's CPU build uses Triton only if Triton has a backend.
known = types.SimpleNamespace(is_active=lambda: True)
triton.backends.backends["cpu"] = types.SimpleNamespace(driver=known)

from vllm.v1.attention.ops import triton_attention_helpers, triton_unified_attention  # noqa: E402

from bi_patch.kernels.triton.alibi import apply_alibi_to_score  # noqa: E402
from bi_patch.kernels.triton.softmax import softmax_step  # noqa: E402

del triton.backends.backends["cpu"]
for module in (triton_attention_helpers, triton_unified_attention):
    module.softmax_step, module.apply_alibi_to_score = softmax_step, apply_alibi_to_score
kernel = triton_unified_attention.kernel_unified_attention

# (heads, heads of keys, head size, window, soft cap, sinks, ALiBi)
KINDS = {
    "plain 64": (8, 2, 64, 0, 0.0, False, False),
    "plain 128": (8, 2, 128, 0, 0.0, False, False),
    "window and soft cap 256": (4, 2, 256, 512, 50.0, False, False),
    "window and sinks 64": (64, 8, 64, 128, 0.0, True, False),
    "alibi 128": (8, 8, 128, 0, 0.0, False, True),
}


class Compiled:
    """Stands in for the kernel: compiles for a GPU instead of launching."""

    said = ""

    def __getitem__(self, grid):
        return lambda **given: print("COMPILED", self.said, kernel.warmup(grid=grid, **given).metadata.shared)


class Driver:
    """Stands in for the driver of a GPU."""

    def __init__(self, capability):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def attend(heads, key_heads, size, window, cap, sinks, alibi):
    pages = torch.zeros(4, 16, key_heads, size, dtype=torch.bfloat16)
    q = torch.zeros(48, heads, size, dtype=torch.bfloat16)
    triton_unified_attention.unified_attention(
        q=q,
        k=pages,
        v=pages,
        out=torch.empty_like(q),
        cu_seqlens_q=torch.tensor([0, 48], dtype=torch.int32),
        max_seqlen_q=48,
        seqused_k=torch.tensor([64], dtype=torch.int32),
        max_seqlen_k=64,
        softmax_scale=size**-0.5,
        causal=True,
        window_size=(window - 1, 0) if window else (-1, -1),
        block_table=torch.arange(4, dtype=torch.int32)[None],
        softcap=cap,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        alibi_slopes=torch.ones(heads) if alibi else None,
        sinks=torch.ones(heads, dtype=torch.bfloat16) if sinks else None,
    )


compiled = triton_unified_attention.kernel_unified_attention = Compiled()
for capability in map(int, sys.argv[1:]):
    triton.runtime.driver.set_active(Driver(capability))
    kernel.device_caches.clear()
    for name, kind in KINDS.items():
        compiled.said = f"{capability} {name}"
        attend(*kind)
