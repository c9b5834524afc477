"""Seams of sampling and logprobs."""

import functools

from bi_patch.seams.model import Seam, Target, Variable
from bi_patch.seams.overlay import Overlay, with_globals


def _top_k_top_p(original):
    """apply_top_k_top_p: one kernel for every number of requests, in pieces that take one path through it."""

    def apply_top_k_top_p(logits, k, p, has_topp_only_rows=True):
        from vllm.v1.sample.ops.topk_topp_triton import apply_top_k_top_p_triton

        if k is None and p is None:
            return logits
        logits = _packed_rows(logits)
        # Only rows with top-p alone take another path in small batches.
        split = p is not None and has_topp_only_rows
        told = {} if has_topp_only_rows else {"has_topp_only_rows": False}
        size = _PIECE if split else max(1, logits.shape[0])
        for start in range(0, logits.shape[0], size):
            piece = slice(start, start + size)
            apply_top_k_top_p_triton(
                logits[piece], None if k is None else k[piece], None if p is None else p[piece], **told
            )
        return logits

    return apply_top_k_top_p


def _logits(original):
    """LogitsProcessor._get_logits: rows of logits lie as far apart alone as in a batch."""

    @functools.wraps(original)
    def _get_logits(self, *args, **kwargs):
        logits = original(self, *args, **kwargs)
        return logits if logits is None else _packed_rows(logits)

    return _get_logits


def _processed(original):
    """Sampler.apply_sampling_params: logits that no request of the batch changes become fp32 as those of others do."""

    @functools.wraps(original)
    def apply_sampling_params(self, logits, *args, **kwargs):
        logits = original(self, logits, *args, **kwargs)
        return _packed_rows(logits.float()) if self.logprobs_mode == "processed_logprobs" else logits

    return apply_sampling_params


def _packed_rows(x):
    """x [rows, C] with a row stride of C. PyTorch calls one row contiguous whatever its stride; Triton compiles other
    sums for strides that 16 divides."""
    return x.contiguous().reshape(-1).view(x.shape)


def _split_count(original):
    """_topp_split_count: how many programs share a row does not follow the number of rows."""

    @functools.wraps(original)
    def _topp_split_count(batch_size, *sizes):
        return original(_SPLIT_AS_FOR, *sizes)

    return _topp_split_count


def _sorted_topk(original):
    """A function that calls torch.topk, with ties broken by the lower token."""
    import torch

    from bi_patch.ops.topk import topk

    static = isinstance(original, staticmethod)
    function = with_globals(original.__func__ if static else original, torch=Overlay(torch, topk=topk))
    return staticmethod(function) if static else function


# The split top-p pipeline takes at most 64 rows; larger batches would take another kernel.
_PIECE = 64


# 8 to 32 programs a row: as upstream does for 16 rows.
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
        close=_logits,
        why="a padded vocabulary leaves one row of logits at another stride than several; kernels sum by the stride",
        how="logits are packed where the vocabulary is padded, so that the stride is the same for every number of rows",
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
        why="top-p sums a row in another order for 1, 8 or 65 requests, so a token at the edge comes or goes",
        how="one Triton path for every number of requests, in pieces of at most 64",
        until="upstream sums a row in one order",
        causes=(21,),
        serves=("TopKTopPSampler",),
    ),
    Seam(
        name="sampling.cuda_split_count",
        targets=(Target("vllm.v1.sample.ops.topk_topp_triton", "_topp_split_count", ">=0.32"),),
        close=_split_count,
        why="the number of programs that share a row of top-p follows the number of requests",
        how="one number of programs for every batch",
        until="upstream sums a row in one order",
        causes=(21,),
    ),
    Seam(
        name="sampling.cuda_processed_logprobs",
        targets=(Target("vllm.v1.worker.gpu.sample.sampler", "Sampler.apply_sampling_params", ">=0.32"),),
        close=_processed,
        why="--logprobs-mode processed_logprobs sums fp32 logits if any request is processed, else 16-bit ones in "
        "another order",
        how="in this mode logits are always fp32",
        until="upstream's logits have one type",
        causes=(21,),
    ),
    Seam(
        name="sampling.cuda_gather_logprobs",
        targets=(Target("vllm.v1.sample.sampler", "Sampler.gather_logprobs"),),
        close=_sorted_topk,
        why="top-k algorithms are chosen by the number of rows and break ties differently; bf16 logits tie often",
        how="ties go to the lower token",
        until="upstream's top logprobs are stable",
        causes=(13, 21),
    ),
    Seam(
        name="sampling.cuda_topk_scores",
        targets=(
            Target(_LOGPROB, "compute_topk_logprobs", "<0.26", _LOGPROB_COPIES),
            Target(_LOGPROB, "compute_topk_scores", ">=0.26", _LOGPROB_COPIES_026),
        ),
        close=_sorted_topk,
        why="top-k algorithms are chosen by the number of rows and break ties differently; bf16 logits tie often",
        how="ties go to the lower token",
        until="upstream's top logprobs are stable",
        causes=(13, 21),
    ),
)

VARIABLES = (
    Variable(
        name="sampling.cuda_flashinfer",
        variable="VLLM_USE_FLASHINFER_SAMPLER",
        value="0",
        why="FlashInfer's rejection sampling draws from one generator for the whole batch",
    ),
)
