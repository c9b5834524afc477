"""Attention of vLLM-Ascend: one backend, whose fused operator the dispatch table serves.

bi_patch turns paged attention off and refuses attention inside a full graph.
"""

from bi_patch.seams.ascend.common import refuse, refusing
from bi_patch.seams.model import Policy, Seam, Target

_BACKEND = "vllm_ascend.attention.attention_v1.AscendAttentionBackend"
_MODULE = "vllm_ascend.attention.attention_v1"
_LEAF = 128


def _only_one_backend(original):
    """NPUPlatform.get_attn_backend_cls: refuse every backend except AscendAttentionBackend."""

    def get_attn_backend_cls(cls, *args, **kwargs):
        name = original.__func__(cls, *args, **kwargs)
        if name != _BACKEND:
            refuse(
                "attention.ascend_backend",
                [name],
                "Use a model without MLA or sparse attention, and the default backend",
            )
        return name

    return classmethod(get_attn_backend_cls)


def _no_paged(original):
    """using_paged_attention: False, because the number of tokens would decide."""

    def using_paged_attention(runtime_shape, vllm_config, head_size=None) -> bool:
        return False

    return using_paged_attention


def _block_size(config) -> None:
    size = getattr(config.cache_config, "block_size", None)
    if size and size % _LEAF:
        refuse(
            "attention.ascend_block_size",
            [f"blocks of {size} tokens"],
            f"Use --block-size {_LEAF} or a multiple",
        )


def _graph_form(name: str, qualname: str) -> Seam:
    return Seam(
        name=f"attention.ascend_{name}",
        targets=(Target(_MODULE, qualname),),
        close=refusing(
            f"attention.ascend_{name}",
            "attention inside a full graph",
            "Use cudagraph_mode PIECEWISE or NONE",
        ),
        why="attention in a captured graph keeps the split of work and the lengths of its capture",
        how="bi_patch refuses the call. The graph mode is piecewise or none, so vLLM-Ascend does not make it",
        until="vLLM-Ascend's full graphs are batch-invariant (https://github.com/vllm-project/vllm-ascend/issues/5487)",
        causes=(3, 17, 19),
    )


SEAMS = (
    Seam(
        name="attention.ascend_backend",
        targets=(Target("vllm_ascend.platform", "NPUPlatform.get_attn_backend_cls"),),
        close=_only_one_backend,
        why="MLA, sparse and context-parallel backends call operators that split their work by the batch",
        how="bi_patch refuses these backends by name",
        until="bi_patch or vLLM-Ascend has batch-invariant operators for them "
        "(https://github.com/vllm-project/vllm-ascend/issues/5487)",
        causes=(3, 4),
    ),
    Seam(
        name="attention.ascend_paged",
        targets=(
            Target(
                "vllm_ascend.attention.utils",
                "using_paged_attention",
                copies=(_MODULE, "vllm_ascend.worker.model_runner_v1"),
            ),
        ),
        close=_no_paged,
        why="vLLM-Ascend uses paged attention for some numbers of tokens only",
        how="the fused operator serves every number of tokens",
        until="never: this patch point fixes the reduction order",
        causes=(3, 25),
    ),
    _graph_form("full_graph", "AscendAttentionBackendImpl.full_graph_fia"),
    _graph_form("full_graph_v2", "AscendAttentionBackendImpl.full_graph_fia_v2"),
    _graph_form("full_graph_paged", "AscendAttentionBackendImpl.full_graph_pa"),
)

POLICIES = (
    Policy(
        name="attention.ascend_block_size",
        apply=_block_size,
        why="the bundled attention splits keys every 128 positions, and such a part must lie inside one KV block",
    ),
)
