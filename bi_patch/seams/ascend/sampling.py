"""Sampling on Ascend: one method for top-k and top-p for every number of requests, on the dispatch table's sums."""

from bi_patch.seams.model import Seam, Target


def _one_way(original):
    """apply_top_k_top_p: always sort and sum in PyTorch, never in the Triton kernel for larger batches."""

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
        why="from 8 requests on, vLLM uses another kernel. A token at the edge of top-p is then kept in one batch and "
        "dropped in another",
        how="every number of requests uses a sort and a running sum, and the lower of two tied tokens comes first",
        until="upstream computes top-p in one order for every number of requests "
        "(https://github.com/vllm-project/vllm/pull/50979)",
        causes=(21,),
    ),
)
