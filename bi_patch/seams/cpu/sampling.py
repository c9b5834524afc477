"""Sampling and logprobs: seeded draws that a request can take back, and ties in one order."""

import functools

from bi_patch.seams import ties
from bi_patch.seams.model import Seam, Target


def _generator(original):
    """InputBatch.add_request: give a seeded request a generator that can take back its last draw."""

    @functools.wraps(original)
    def add_request(self, request, *args, **kwargs):
        from bi_patch.ops.cpu import draws

        if request.generator is not None:
            request.generator = draws.rewindable(request.generator)
        return original(self, request, *args, **kwargs)

    return add_request


def _sample(original):
    """TopKTopPSampler.forward_cpu: keep each generator's state before it draws, so that it can take the draw back."""

    @functools.wraps(original)
    def forward_cpu(self, logits, generators, k, p):
        from bi_patch.ops.cpu import draws

        draws.remember(generators.values())
        return original(self, logits, generators, k, p)

    return forward_cpu


def _top_k_top_p(original):
    """apply_top_k_top_p: mask only the rows whose own request has top-k or top-p."""

    def apply_top_k_top_p(logits, k, p, has_topp_only_rows=True):
        from bi_patch.ops.cpu import top_k_top_p

        return top_k_top_p.mask(logits, k, p)

    return apply_top_k_top_p


# The modules that import apply_top_k_top_p by name. The CPU build holds them all, and loads the first.
_COPIES = (
    "vllm.v1.sample.rejection_sampler",
    "vllm.v1.worker.gpu.sample.states",
    "vllm.v1.worker.gpu.sample.sampler",
    "vllm.v1.watermarking.gpu_sampler",
    "vllm.model_executor.models.diffusion_gemma",
)


SEAMS = (
    Seam(
        name="sampling.cpu_top_k_top_p",
        targets=(Target("vllm.v1.sample.ops.topk_topp_sampler", "apply_top_k_top_p", copies=_COPIES),),
        close=_top_k_top_p,
        why="a step in which one request has top-p masks every row. A row without top-p then loses the tokens whose "
        "probability underflows to 0",
        how="bi_patch masks only the rows whose own request has top-k or top-p. Of tied tokens, top-p drops the lower "
        "token first",
        until="upstream masks only the rows that ask (https://github.com/vllm-project/vllm/pull/42259)",
        causes=(27,),
    ),
    Seam(
        name="sampling.cpu_gather_logprobs",
        targets=(Target("vllm.v1.sample.sampler", "Sampler.gather_logprobs"),),
        close=ties.sorted_topk,
        why="vLLM computes as many top logprobs as the most demanding request wants, and this number decides the order "
        "of ties",
        how="of tied tokens, the lower token comes first",
        until="vLLM orders tied tokens in one way. PyTorch does not yet "
        "(https://github.com/pytorch/pytorch/issues/27542)",
        causes=(8, 13),
    ),
    Seam(
        name="sampling.cpu_generator",
        targets=(Target("vllm.v1.worker.gpu_input_batch", "InputBatch.add_request"),),
        close=_generator,
        why="vLLM draws once for each chunk of a prompt and takes the draw back. A CPU generator cannot do that, so "
        "stock vLLM stops with an error",
        how="a seeded request gets a generator that can restore its state from before the last draw",
        until="upstream draws only for requests that sample (https://github.com/vllm-project/vllm/pull/10097)",
        causes=(21,),
    ),
    Seam(
        name="sampling.cpu_draw",
        targets=(Target("vllm.v1.sample.ops.topk_topp_sampler", "TopKTopPSampler.forward_cpu"),),
        close=_sample,
        why="a row's draw must depend only on the row's own seed and position",
        how="bi_patch keeps each generator's state before the draw, so that a discarded draw leaves no trace",
        until="upstream draws only for requests that sample (https://github.com/vllm-project/vllm/pull/10097)",
        causes=(21,),
        serves=("TopKTopPSampler",),
    ),
)
