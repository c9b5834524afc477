"""Rotary embedding of vLLM-Ascend: the bundled kernel for neox style, for every number of tokens."""

from bi_patch.seams.ascend.common import refuse
from bi_patch.seams.model import Seam, Target


def _rotary(original):
    """rope_forward_oot, which the custom op vllm::npu_rotary_embedding takes when it is registered."""

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

    rope_forward_oot.__annotations__ = getattr(original, "__annotations__", {})  # the op's schema is read from it
    return rope_forward_oot


SEAMS = (
    Seam(
        name="rotary.ascend_forward",
        targets=(Target("vllm_ascend.ops.rotary_embedding", "rope_forward_oot"),),
        close=_rotary,
        why="a Triton kernel or a vendor operator is taken by what is installed; neither states where it rounds",
        how="the bundled kernel: fp32 inside, rounded once",
        until="upstream states where it rounds",
        causes=(17,),
    ),
)
