"""Rotary embedding of vLLM-Ascend: the bundled kernel serves neox style for every number of tokens."""

from bi_patch.seams.ascend.common import refuse
from bi_patch.seams.model import Seam, Target


def _rotary(original):
    """rope_forward_oot, the function of the custom op vllm::npu_rotary_embedding: call the bundled kernel."""

    def rope_forward_oot(
        positions,
        query,
        key,
        cos_sin_cache,
        head_size: int,
        rotary_dim: int,
        is_neox_style: bool,
        offsets=None,
    ):
        from bi_patch.ops.ascend import rotary

        if not is_neox_style or offsets is not None or positions.ndim != 1:
            refuse(
                "rotary.ascend_forward",
                ["rotary embedding other than neox style at plain positions"],
                "Use another model",
            )
        tokens = query.shape[0]
        turned = rotary.rotate(positions, query.reshape(tokens, -1), key.reshape(tokens, -1), cos_sin_cache, head_size)
        return turned[0].view(query.shape), turned[1].view(key.shape)

    rope_forward_oot.__annotations__ = getattr(original, "__annotations__", {})  # hold the op's schema
    return rope_forward_oot


SEAMS = (
    Seam(
        name="rotary.ascend_forward",
        targets=(Target("vllm_ascend.ops.rotary_embedding", "rope_forward_oot"),),
        close=_rotary,
        why="the installed libraries decide whether a Triton kernel or a vendor operator runs, and neither states "
        "where it rounds",
        how="the bundled kernel computes in fp32 and rounds once",
        until="vLLM-Ascend states where its kernels round",
        causes=(17,),
    ),
)
