"""Experts of vLLM-Ascend: routing by softmax and a stable top-k; grouped products and the weighted sum are
served by the table."""

from bi_patch.seams.ascend.common import refuse
from bi_patch.seams.model import Seam, Target


def _no_fused_gating(original):
    """check_npu_moe_gating_top_k: never; the fused operator states neither its sum's order nor its ties."""

    def check_npu_moe_gating_top_k(*args, **kwargs) -> bool:
        return False

    return check_npu_moe_gating_top_k


def _routed_rows(original):
    """BaseDeviceAdaptor.npu_moe_init_routing: torch_npu's operator, which only moves rows, on every chip."""

    def npu_moe_init_routing(hidden_states, topk_ids, *, scale=None, quant_mode=-1, act_quant_type=None, **options):
        import torch_npu

        if scale is not None or quant_mode != -1:
            refuse("moe.ascend_routing", ["rows quantized as they are routed"], "Use unquantized weights")
        return torch_npu.npu_moe_init_routing_v2(hidden_states, topk_ids, quant_mode=quant_mode, **options)

    return staticmethod(npu_moe_init_routing)


SEAMS = (
    Seam(
        name="moe.ascend_gating",
        targets=(Target("vllm_ascend.ops.fused_moe.experts_selector", "check_npu_moe_gating_top_k"),),
        close=_no_fused_gating,
        why="the fused gating operator sums and breaks ties in an order of its own",
        how="softmax, a stable top-k and a sum that the table serves",
        until="upstream states its order",
        causes=(10, 13),
    ),
    Seam(
        name="moe.ascend_routing",
        targets=(Target("vllm_ascend.device.device_op", "BaseDeviceAdaptor.npu_moe_init_routing"),),
        close=_routed_rows,
        why="on A2 and A3 it calls vLLM-Ascend's C++ library, whose operators are off",
        how="torch_npu's operator of the same meaning, as upstream does on A5; it moves rows and counts them",
        until="upstream calls torch_npu's on every chip",
        causes=(13,),
    ),
)
