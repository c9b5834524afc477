"""What the trainer calls of vLLM on CUDA: only kernels that the sampler calls too. No other file here imports vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bi_patch.errors import MissingDependency

if TYPE_CHECKING:
    import torch


def load() -> None:
    """Load vLLM's compiled kernels. Raises MissingDependency if that fails."""
    try:
        import vllm._custom_ops  # noqa: F401  defines torch.ops._C
        from vllm.vllm_flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError as error:
        raise MissingDependency(f"training.device: the trainer calls vLLM's kernels, and vLLM fails: {error}") from None


def flash_attention(**given) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention 3 in one split, causal: (output [rows, heads, D], lse [heads, rows] fp32)."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        causal=True, window_size=[-1, -1], fa_version=3, num_splits=1, return_softmax_lse=True, **given
    )[:2]


def triton_attention(**given) -> torch.Tensor:
    """vLLM's Triton attention, causal, over pages: the output [rows, heads, D]."""
    import torch
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    out = torch.empty_like(given["q"], memory_format=torch.contiguous_format)
    unified_attention(out=out, causal=True, q_descale=None, k_descale=None, v_descale=None, **given)
    return out


def gated(both: torch.Tensor, kind: str) -> torch.Tensor:
    """activation(gate) * up of both [rows, 2 * D], which holds gate, then up -> [rows, D]."""
    import torch

    name = {"silu": "silu_and_mul", "gelu_tanh": "gelu_tanh_and_mul", "gelu": "gelu_and_mul"}[kind]
    out = torch.empty((both.shape[0], both.shape[1] // 2), dtype=both.dtype, device=both.device)
    getattr(torch.ops._C, name)(out, both)
    return out


def route(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k experts of logits [rows, experts] by softmax: weights fp32 and ids int32 [rows, top_k]."""
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk

    return fused_topk(logits, logits, top_k, renormalize)[:2]


def experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    kind: str,
    tile: dict[str, int],
) -> torch.Tensor:
    """vLLM's Triton experts in one tile. Shapes as in bi_patch.training.cpu.experts, all of x's dtype."""
    from vllm.model_executor.layers.fused_moe import fused_moe, override_config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    with override_config(tile):
        return fused_moe.fused_experts(x, gate_up, down, weights, ids, activation=MoEActivation(kind))


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """As model runner V2 sums: the logprobs of tokens [rows] int64 under logits [rows, V] -> [rows] fp32."""
    from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs

    return compute_token_logprobs(logits, tokens[:, None])[:, 0]


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """As model runner V1 sums: log-softmax of logits [rows, V] fp32, by upstream's mode."""
    try:
        from vllm.model_executor.determinism.batch_invariant import log_softmax
    except ImportError:  # before vLLM 0.32
        from vllm.model_executor.layers.batch_invariant import log_softmax
    return log_softmax(logits, dim=-1)


def divide(logits: torch.Tensor, temperature: torch.Tensor) -> None:
    """As model runner V2 divides: logits [rows, V] fp32 by temperature [rows] fp32, in place."""
    import torch
    from vllm.v1.worker.gpu.sample.gumbel import apply_temperature

    apply_temperature(logits, torch.arange(len(logits), dtype=torch.int32, device=logits.device), temperature)


def truncates_as_armed() -> bool:
    """Whether the patch point sampling.cuda_top_k_top_p is closed in this process."""
    from vllm.v1.sample.ops import topk_topp_sampler

    return topk_topp_sampler.apply_top_k_top_p.__module__ == "bi_patch.seams.cuda.sampling"


def top_k_top_p(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    """Mask logits [rows, V] fp32 outside top-k and top-p [rows], by the sampler's function, which arming replaced."""
    from vllm.v1.sample.ops import topk_topp_sampler

    return topk_topp_sampler.apply_top_k_top_p(logits, None if k is None else k.int(), p)
