"""Fake implementations of the `bi_cpu` ops: output shapes and dtypes, for tracing by torch.compile."""

from __future__ import annotations

import torch

# Outputs per weight panel: kPanel of csrc/gemm.cpp.
_PANEL = {"amx_bf16": 64, "avx512_bf16": 64, "avx512": 64, "avx2": 16, "portable": 16}


def packed_size(isa: str, dtype: torch.dtype, n: int, k: int) -> int:
    """Elements of a packed weight [n, k], as gemm_packed_size of csrc/gemm.cpp."""
    tiles = isa == "amx_bf16" and dtype == torch.bfloat16  # csrc/gemm_amx.cpp
    panel = 32 if tiles else _PANEL[isa]
    pad = 32 if tiles else 2 if dtype == torch.bfloat16 else 1
    return -(-n // panel) * panel * (-(-k // pad) * pad)


def register_fakes(isa: str) -> None:
    """Register the fakes of every `bi_cpu` op. Call this once, after loading the library."""

    @torch.library.register_fake("bi_cpu::gemm_pack")
    def _(weight):
        n, k = weight.shape
        return weight.new_empty(packed_size(isa, weight.dtype, n, k))

    @torch.library.register_fake("bi_cpu::gemm")
    def _(x, packed, n, k, bias):
        torch._check(x.shape[-1] == k, lambda: f"bi_cpu.gemm: x must be [..., K={k}], got {tuple(x.shape)}")
        return x.new_empty((*x.shape[:-1], n))

    @torch.library.register_fake("bi_cpu::gemm_sums")
    def _(x, packed, n, k):
        return x.new_empty((x.shape[0], n), dtype=torch.float32)

    @torch.library.register_fake("bi_cpu::lora")
    def _(y, x, a, b, slots, packed=None, ranks=None):
        return None

    @torch.library.register_fake("bi_cpu::kv_store")
    def _(key, value, kv_cache, slot_mapping):
        return None

    @torch.library.register_fake("bi_cpu::attention")
    def _(out, query, kv_cache, query_start_loc, seq_lens, block_table, scale, window_left, softcap, causal=True):
        return None

    @torch.library.register_fake("bi_cpu::latent_attention")
    def _(out, query, cache, query_start_loc, seq_lens, block_table, scale):
        return None

    @torch.library.register_fake("bi_cpu::heads_gemm")
    def _(out, x, packed):
        return None

    @torch.library.register_fake("bi_cpu::rms_norm")
    def _(x, weight, eps, offset):
        return x.new_empty(x.shape)

    @torch.library.register_fake("bi_cpu::add_rms_norm")
    def _(x, residual, weight, eps, offset):
        return x.new_empty(x.shape), x.new_empty(x.shape)

    @torch.library.register_fake("bi_cpu::silu_and_mul")
    def _(x):
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))

    @torch.library.register_fake("bi_cpu::gelu_and_mul")
    def _(x, tanh):
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))

    def pointwise(x, *_):
        return torch.empty_like(x)

    for name in ("sigmoid", "silu", "gelu", "rsqrt", "softplus"):
        torch.library.register_fake(f"bi_cpu::{name}", pointwise)

    @torch.library.register_fake("bi_cpu::l2_normalize")
    def _(x, eps):
        return x.new_empty(x.shape)

    @torch.library.register_fake("bi_cpu::softmax")
    def _(x):
        return x.new_empty(x.shape)

    @torch.library.register_fake("bi_cpu::mean_rows")
    def _(x, starts):
        return x.new_empty((starts.shape[0] - 1, x.shape[1]), dtype=torch.float32)

    @torch.library.register_fake("bi_cpu::rope")
    def _(positions, x, cache, head_size, neox):
        return x.new_empty(x.shape)

    @torch.library.register_fake("bi_cpu::softmax_topk")
    def _(logits, k, renormalize):
        shape = (logits.shape[0], k)
        return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)

    @torch.library.register_fake("bi_cpu::gated_rms_norm")
    def _(x, gate, weight, eps, group, gate_first, sigmoid):
        return x.new_empty(x.shape)

    @torch.library.register_fake("bi_cpu::causal_conv")
    def _(x, weight, bias, states, query_start_loc, slots, fresh, silu):
        return x.new_empty(x.shape)

    @torch.library.register_fake("bi_cpu::mamba1")
    def _(x, *_):
        return x.new_empty(x.shape)

    for name in ("gated_delta_rule", "mamba2"):
        torch.library.register_fake(f"bi_cpu::{name}", lambda *_: None)
