"""What runs compared of ranks that share a layer of experts, or MLA's heads. The rows of the feature table ask here."""

from __future__ import annotations

from typing import Any

_QWEN3, _DEEPSEEK = "Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM"
_MINIMAX, _GPT_OSS = "MiniMaxM2ForCausalLM", "GptOssForCausalLM"
_QUANTIZED = frozenset({_MINIMAX, _GPT_OSS})  # measured as published
# Two layers of published sizes: architecture, tensor-parallel ranks, data-parallel ranks, whether a rank holds whole
# experts (expert parallelism), whether vLLM compiled the model.
RUNS = frozenset(
    {
        (_MINIMAX, 2, 1, False, True),
        (_MINIMAX, 2, 1, False, False),
        (_GPT_OSS, 2, 1, False, False),
        (_QWEN3, 2, 1, False, True),
        (_QWEN3, 2, 1, False, False),
        (_QWEN3, 4, 1, False, True),
        (_QWEN3, 2, 1, True, True),
        (_QWEN3, 2, 1, True, False),
        (_QWEN3, 1, 2, False, True),
        (_QWEN3, 1, 2, False, False),
        (_QWEN3, 1, 2, True, True),
        (_QWEN3, 1, 2, True, False),
        (_DEEPSEEK, 2, 1, False, True),
        (_DEEPSEEK, 2, 1, True, True),
        (_DEEPSEEK, 2, 1, True, False),
        (_DEEPSEEK, 4, 1, True, True),
        (_DEEPSEEK, 1, 2, True, True),
    }
)


def size(config: Any, name: str) -> int:
    """A number of the parallel configuration. 1 where a release has none."""
    return int(getattr(config.parallel_config, name, 1) or 1)


def compiled(config: Any) -> bool:
    """Whether vLLM compiles the engine's model."""
    return config.model_config is not None and not getattr(config.model_config, "enforce_eager", False)


def whole_experts(config: Any) -> bool:
    """Whether ranks hold whole experts, where ranks share a layer of experts."""
    return bool(getattr(config.parallel_config, "enable_expert_parallel", False))


def elsewhere(config: Any) -> bool:
    """Whether data-parallel ranks may run on another host, or behind a load balancer of the user's own.

    vLLM counts hosts in `nnodes` for other kinds of parallelism. An engine core keeps the front end's values.
    """
    balanced = any(
        getattr(config.parallel_config, f"data_parallel_{kind}_lb", False) for kind in ("external", "hybrid")
    )
    return balanced or size(config, "data_parallel_size_local") != size(config, "data_parallel_size")


def norms(config: Any) -> bool:
    """Whether ranks share the rows of norms over all heads of a layer (MiniMax-M2)."""
    named = getattr(config.model_config, "architectures", None) or ()
    return size(config, "tensor_parallel_size") > 1 and any(name.startswith("MiniMaxM2") for name in named)


def shown(config: Any) -> bool:
    """Whether a run compared bits of an engine's model over as many ranks of one host, compiled or not."""
    own = set(getattr(config.model_config, "architectures", None) or ())
    kind = (
        size(config, "tensor_parallel_size"),
        size(config, "data_parallel_size"),
        whole_experts(config),
        compiled(config),
    )
    if own & _QUANTIZED and getattr(config.model_config, "quantization", None) is None:
        return False
    return bool(own) and {(name, *kind) for name in own} <= RUNS and not elsewhere(config)
