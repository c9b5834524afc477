"""Norms of vLLM-Ascend. The dispatch table serves RMSNorm's operators, npu_rms_norm and npu_add_rms_norm.

bi_patch refuses the gated form.
"""

from bi_patch.seams.ascend.common import refusing
from bi_patch.seams.model import Seam, Target

SEAMS = (
    Seam(
        name="norm.ascend_gated",
        targets=(Target("vllm_ascend.ops.layernorm", "AscendRMSNormGated.forward_oot"),),
        close=refusing("norm.ascend_gated", "gated RMSNorm", "Use a model without it"),
        why="the number of rows decides the blocks of the Triton kernel for gated RMSNorm",
        how="bi_patch refuses gated RMSNorm, which only hybrid models use",
        until="bi_patch has a kernel for gated RMSNorm",
        causes=(2, 24),
    ),
)
