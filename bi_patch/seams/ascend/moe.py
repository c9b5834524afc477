"""Experts of vLLM-Ascend: routing by softmax and a stable top-k; grouped products and the weighted sum are
served by the table."""

from bi_patch.seams.ascend.common import ASCEND, RELEASES
from bi_patch.seams.model import Seam, Target


def _no_fused_gating(original):
    """check_npu_moe_gating_top_k: never; the fused operator states neither its sum's order nor its ties."""

    def check_npu_moe_gating_top_k(*args, **kwargs) -> bool:
        return False

    return check_npu_moe_gating_top_k


SEAMS = (
    Seam(
        name="moe.ascend_gating",
        targets=(
            Target("vllm_ascend.ops.fused_moe.experts_selector", "check_npu_moe_gating_top_k", RELEASES),
        ),
        close=_no_fused_gating,
        why="the fused gating operator sums and breaks ties in an order of its own",
        how="softmax, a stable top-k and a sum that the table serves",
        until="upstream states its order",
        platforms=ASCEND,
        causes=(10, 13),
    ),
)
