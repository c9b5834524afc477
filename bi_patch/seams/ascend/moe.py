"""Experts of vLLM-Ascend: the router uses softmax and a stable top-k.

The dispatch table serves the grouped products and the weighted sum.
"""

from bi_patch.seams.ascend.common import refuse
from bi_patch.seams.model import Seam, Target


def _no_fused_gating(original):
    """check_npu_moe_gating_top_k: False, because the fused operator states neither the order of its sum nor of ties."""

    def check_npu_moe_gating_top_k(*args, **kwargs) -> bool:
        return False

    return check_npu_moe_gating_top_k


def _routed_rows(original):
    """BaseDeviceAdaptor.npu_moe_init_routing: call torch_npu's operator, which only moves rows, on every chip."""

    def npu_moe_init_routing(hidden_states, topk_ids, *, scale=None, quant_mode=-1, act_quant_type=None, **options):
        import torch_npu

        if scale is not None or quant_mode != -1:
            refuse(
                "moe.ascend_routing", ["quantization of rows on their way to the experts"], "Use unquantized weights"
            )
        return torch_npu.npu_moe_init_routing_v2(hidden_states, topk_ids, quant_mode=quant_mode, **options)

    return staticmethod(npu_moe_init_routing)


SEAMS = (
    Seam(
        name="moe.ascend_gating",
        targets=(Target("vllm_ascend.ops.fused_moe.experts_selector", "check_npu_moe_gating_top_k"),),
        close=_no_fused_gating,
        why="the fused gating operator sums in an order of its own and breaks ties in its own way",
        how="the router uses softmax, a stable top-k and a sum, which bi_patch's dispatch table serves",
        until="vLLM-Ascend states the order of this operator",
        causes=(10, 13),
    ),
    Seam(
        name="moe.ascend_routing",
        targets=(Target("vllm_ascend.device.device_op", "BaseDeviceAdaptor.npu_moe_init_routing"),),
        close=_routed_rows,
        why="on A2 and A3, vLLM-Ascend calls an operator of its C++ library, and bi_patch turns that library off",
        how="every chip uses torch_npu's operator with the same result, as upstream does on A5. It only moves and "
        "counts rows",
        until="vLLM-Ascend calls torch_npu's operator on every chip",
        causes=(13,),
    ),
)
