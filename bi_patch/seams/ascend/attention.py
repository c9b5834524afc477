"""Attention of vLLM-Ascend: one backend, through the fused operator that the table serves; paged and
full-graph forms refused."""

from bi_patch.seams.ascend.common import refuse, refusing
from bi_patch.seams.model import Policy, Seam, Target

_BACKEND = "vllm_ascend.attention.attention_v1.AscendAttentionBackend"
_MODULE = "vllm_ascend.attention.attention_v1"
_LEAF = 128


def _only_one_backend(original):
    """NPUPlatform.get_attn_backend_cls: any other than the fused one is refused."""

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
    """using_paged_attention: never; it would be chosen by the number of tokens."""

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
        why="a captured attention keeps the work split and the lengths of its capture",
        how="refused: the graph mode is piecewise or none, so it is never called",
        until="upstream's graphs take lengths from tensors",
        causes=(3, 17, 19),
    )


SEAMS = (
    Seam(
        name="attention.ascend_backend",
        targets=(Target("vllm_ascend.platform", "NPUPlatform.get_attn_backend_cls"),),
        close=_only_one_backend,
        why="MLA, sparse and context-parallel backends call operators whose split follows the batch",
        how="refused by name",
        until="a route serves them",
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
        why="paged attention is taken for some numbers of tokens only",
        how="the fused operator serves every number of tokens",
        until="never: it is the order",
        causes=(3, 25),
    ),
    _graph_form("full_graph", "AscendAttentionBackendImpl.full_graph_fia"),
    _graph_form("full_graph_v2", "AscendAttentionBackendImpl.full_graph_fia_v2"),
    _graph_form("full_graph_paged", "AscendAttentionBackendImpl.full_graph_pa"),
)

POLICIES = (
    Policy(
        name="attention.ascend_block_size", apply=_block_size, why="keys are cut every 128 positions, inside one block"
    ),
)
