"""What runs compared of ranks that share a layer of experts, or MLA's heads. The rows of the feature table ask here."""

from __future__ import annotations

from typing import Any

_QWEN3, _DEEPSEEK, _DEEPSEEK_3 = "Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
_MINIMAX, _GPT_OSS, _NEXT = "MiniMaxM2ForCausalLM", "GptOssForCausalLM", "Qwen3NextForCausalLM"
_QUANTIZED = frozenset({_MINIMAX, _GPT_OSS})  # measured as published
_COMPILED, _BOTH = (True,), (True, False)
# Few layers of published sizes, DeepSeek V3 in smaller ones: tensor-parallel ranks, data-parallel ranks, whether a rank
# holds whole experts (expert parallelism), and whether vLLM compiled the model.
_MEASURED: dict[str, tuple[tuple[int, int, bool, tuple[bool, ...]], ...]] = {
    _MINIMAX: ((2, 1, False, _BOTH),),
    _GPT_OSS: ((2, 1, False, _BOTH),),
    _NEXT: ((2, 1, False, _BOTH),),
    _QWEN3: (
        *((2, data, whole, _BOTH) for data in (1, 2) for whole in (False, True)),
        *((1, data, whole, _BOTH) for data in (2, 4) for whole in (False, True)),
        (4, 1, False, _BOTH),
        (4, 1, True, _COMPILED),
    ),
    _DEEPSEEK: (
        (2, 1, False, _BOTH),
        (2, 1, True, _BOTH),
        (4, 1, True, _COMPILED),
        (1, 2, True, _BOTH),
    ),
    _DEEPSEEK_3: ((1, 2, True, _BOTH),),
}
RUNS = frozenset(
    (name, tensor, data, whole, compiled)
    for name, runs in _MEASURED.items()
    for tensor, data, whole, modes in runs
    for compiled in modes
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
