"""Sampling on Ascend: one way to top-k and top-p for every number of requests; its sums are served by the
table."""

from bi_patch.seams.model import Seam, Target


def _one_way(original):
    """apply_top_k_top_p: sort and running sum, never the Triton kernel that takes over at some numbers of
    requests."""

    def apply_top_k_top_p(logits, k, p):
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

        return logits if k is None and p is None else apply_top_k_top_p_pytorch(logits, k, p)

    return apply_top_k_top_p


SEAMS = (
    Seam(
        name="sampling.ascend_top_k_top_p",
        targets=(
            Target(
                "vllm.v1.sample.ops.topk_topp_sampler",
                "apply_top_k_top_p",
                copies=(
                    "vllm.v1.sample.rejection_sampler",
                    "vllm.v1.worker.gpu.sample.states",
                    "vllm.v1.worker.gpu.sample.sampler",
                ),
            ),
        ),
        close=_one_way,
        why="another kernel is taken from 8 requests on, so a token at the edge of top-p comes or goes",
        how="sort and running sum for every number of requests, with ties to the lower token",
        until="upstream sums a row in one order",
        causes=(21,),
    ),
)
