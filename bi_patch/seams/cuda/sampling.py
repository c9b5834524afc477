"""Sampling and logprobs: neither the number of requests nor their options decide how a row is summed."""

import functools
import inspect

from bi_patch.seams import ties
from bi_patch.seams.model import Seam, Target, Variable


def _top_k_top_p(original):
    """apply_top_k_top_p: call one compiled Triton kernel for all requests, in pieces that it treats alike."""
    import torch

    has_flag = "has_topp_only_rows" in inspect.signature(original).parameters

    def apply_top_k_top_p(logits, k, p, has_topp_only_rows=True):
        from vllm.v1.sample.ops.topk_topp_triton import apply_top_k_top_p_triton

        if k is None and p is None:
            return logits
        logits = packed_rows(logits)
        rows, vocab = logits.shape
        # The batch size changes the kernel only for rows with top-p and without top-k.
        split = p is not None and has_topp_only_rows
        told = {"has_topp_only_rows": False} if has_flag and not split else {}
        # Without one of the tensors, Triton compiles another kernel for the rows of the other.
        k = torch.full((rows,), vocab, dtype=torch.int32, device=logits.device) if k is None else k
        p = torch.ones(rows, dtype=torch.float32, device=logits.device) if p is None else p
        size = _PIECE if split else max(1, rows)
        for start in range(0, rows, size):
            piece = slice(start, start + size)
            apply_top_k_top_p_triton(logits[piece], k[piece], p[piece], **told)
        return logits

    return apply_top_k_top_p


def packed_logits(original):
    """_get_logits, with and without LoRA: return logits whose row stride is the same for any number of rows."""

    @functools.wraps(original)
    def _get_logits(self, *args, **kwargs):
        logits = original(self, *args, **kwargs)
        return logits if logits is None else packed_rows(logits)

    return _get_logits


def _processed(original):
    """Sampler.apply_sampling_params: return fp32 logits, even if no request of the batch changes its logits."""

    @functools.wraps(original)
    def apply_sampling_params(self, logits, *args, **kwargs):
        logits = original(self, logits, *args, **kwargs)
        return packed_rows(logits.float()) if self.logprobs_mode == "processed_logprobs" else logits

    return apply_sampling_params


def packed_rows(x):
    """x [rows, C] with a row stride of C. PyTorch calls a single row contiguous, whatever its stride. Triton compiles
    another sum for strides that are multiples of 16."""
    return x.contiguous().reshape(-1).view(x.shape)


def _split_count(original):
    """_topp_split_count: the same number of programs shares a row in every batch."""

    @functools.wraps(original)
    def _topp_split_count(batch_size, *sizes):
        return original(_SPLIT_AS_FOR, *sizes)

    return _topp_split_count


# From vLLM 0.32 on, up to 64 rows take the split kernels for top-p. Larger batches would take another kernel.
_PIECE = 64


# As many programs per row (8 to 32) as upstream takes for 16 rows.
_SPLIT_AS_FOR = 16


_TOP_P = "vllm.v1.sample.ops.topk_topp_sampler"


_LOGPROB = "vllm.v1.worker.gpu.sample.logprob"


_TOP_P_COPIES = (
    "vllm.v1.sample.rejection_sampler",
    "vllm.v1.worker.gpu.sample.states",
    "vllm.v1.worker.gpu.sample.sampler",
)


_TOP_P_COPIES_032 = (*_TOP_P_COPIES, "vllm.v1.watermarking.gpu_sampler", "vllm.model_executor.models.diffusion_gemma")


_LOGPROB_COPIES = (
    "vllm.v1.worker.gpu.sample.sampler",
    "vllm.v1.worker.gpu.sample.prompt_logprob",
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler",
)


_LOGPROB_COPIES_026 = (*_LOGPROB_COPIES, "vllm.model_executor.models.diffusion_gemma")


SEAMS = (
    Seam(
        name="sampling.cuda_logits",
        targets=(Target("vllm.model_executor.layers.logits_processor", "LogitsProcessor._get_logits"),),
        close=packed_logits,
        why="with a padded vocabulary, a single row of logits has another stride than several rows, and Triton "
        "compiles another sum for another stride",
        how="bi_patch packs the logits, so that the stride is the same for every number of rows",
        until="upstream packs its logits",
        causes=(19, 21),
    ),
    Seam(
        name="sampling.cuda_top_k_top_p",
        targets=(
            Target(_TOP_P, "apply_top_k_top_p", "<0.32", _TOP_P_COPIES),
            Target(_TOP_P, "apply_top_k_top_p", ">=0.32", _TOP_P_COPIES_032),
        ),
        close=_top_k_top_p,
        why="the number of requests, and the limits of the other requests, decide which kernel computes a row's top-p. "
        "Each kernel sums in its own order. A token at the edge of top-p then stays in one batch and goes in another",
        how="one compiled Triton kernel serves every number of requests and every mix of limits, in pieces of at most "
        "64 rows",
        until="upstream computes top-p in one order for every number of requests "
        "(compare https://github.com/vllm-project/vllm/pull/50979 and https://github.com/vllm-project/vllm/pull/54651)",
        causes=(21, 27),
        serves=("TopKTopPSampler",),
    ),
    Seam(
        name="sampling.cuda_split_count",
        targets=(Target("vllm.v1.sample.ops.topk_topp_triton", "_topp_split_count", ">=0.32"),),
        close=_split_count,
        why="the number of requests decides how many programs share the sum of a row for top-p",
        how="the same number of programs shares a row in every batch",
        until="upstream computes top-p in one order for every number of requests "
        "(https://github.com/vllm-project/vllm/pull/54651 introduced the split)",
        causes=(21,),
    ),
    Seam(
        name="sampling.cuda_processed_logprobs",
        targets=(Target("vllm.v1.worker.gpu.sample.sampler", "Sampler.apply_sampling_params", ">=0.32"),),
        close=_processed,
        why="with --logprobs-mode processed_logprobs, vLLM sums fp32 logits if a request of the step changes its "
        "logits. Otherwise it sums 16-bit logits in another order",
        how="in this mode, logits are fp32 in every step",
        until="upstream's logits have one type in every step",
        causes=(21,),
    ),
    Seam(
        name="sampling.cuda_gather_logprobs",
        targets=(Target("vllm.v1.sample.sampler", "Sampler.gather_logprobs"),),
        close=ties.sorted_topk,
        why="the number of rows decides which algorithm torch.topk runs, and the algorithms order ties differently. "
        "bf16 logits often tie",
        how="of tied tokens, the lower token comes first",
        until="vLLM orders tied tokens in one way. PyTorch does not yet "
        "(https://github.com/pytorch/pytorch/issues/27542)",
        causes=(13, 21),
    ),
    Seam(
        name="sampling.cuda_topk_scores",
        targets=(
            Target(_LOGPROB, "compute_topk_logprobs", "<0.26", _LOGPROB_COPIES),
            Target(_LOGPROB, "compute_topk_scores", ">=0.26", _LOGPROB_COPIES_026),
        ),
        close=ties.sorted_topk,
        why="the number of rows decides which algorithm torch.topk runs, and the algorithms order ties differently. "
        "bf16 logits often tie",
        how="of tied tokens, the lower token comes first",
        until="vLLM orders tied tokens in one way. PyTorch does not yet "
        "(https://github.com/pytorch/pytorch/issues/27542)",
        causes=(13, 21),
    ),
)

VARIABLES = (
    Variable(
        name="sampling.cuda_flashinfer",
        variable="VLLM_USE_FLASHINFER_SAMPLER",
        value="0",
        why="FlashInfer's sampler draws from one generator for the whole batch",
    ),
)
