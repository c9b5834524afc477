"""Norms of vLLM-Ascend. RMSNorm reaches npu_rms_norm and npu_add_rms_norm, which the table serves; the gated
form is refused."""

from bi_patch.seams.ascend.common import refusing
from bi_patch.seams.model import Seam, Target

SEAMS = (
    Seam(
        name="norm.ascend_gated",
        targets=(Target("vllm_ascend.ops.layernorm", "AscendRMSNormGated.forward_oot"),),
        close=refusing("norm.ascend_gated", "gated RMSNorm", "Use a model without it"),
        why="its Triton kernel chooses its blocks by the number of rows",
        how="refused: hybrid models alone use it",
        until="a bundled kernel serves it",
        causes=(2, 24),
    ),
)
