"""What several platforms ask about a model: is its code outside of vLLM's common layers, and how does it rotate?"""

from __future__ import annotations

from typing import Any

from bi_patch.errors import UnsupportedFeature

# Rotation types that Hugging Face's code computes from the longest position of the whole batch.
_ROTATIONS = ("dynamic", "longrope")


def refuse_own_package(config: Any, policy: str) -> None:
    """Refuse a model whose code vLLM keeps in vllm.models, outside of its common layers. policy: the policy's name."""
    from vllm.model_executor.models.registry import ModelRegistry

    for name in config.model_config.architectures if config.model_config is not None else ():
        module = getattr(ModelRegistry.models.get(name), "module_name", "")
        if module.startswith("vllm.models."):
            raise UnsupportedFeature(
                f"{policy}: bi_patch does not cover {name}: its package has kernels of its own, and the batch "
                "decides which kernel runs. Use another model, or set BI_PATCH=0"
            )


def dynamic_rotations(model: Any) -> dict[str, dict]:
    """Rotations that Hugging Face's code computes from the batch: their parameters by type, empty for none.

    model: a vllm.config.ModelConfig. Only models of vLLM's Transformers backend run Hugging Face's rotations.
    """
    if model is None or not model.using_transformers_backend():
        return {}
    held = [getattr(model.hf_text_config, name, None) for name in ("rope_parameters", "rope_scaling")]
    given = [part for part in held if isinstance(part, dict)]
    # Some models have one set for each kind of layer.
    given += [part for parts in given for part in parts.values() if isinstance(part, dict)]
    found = {part.get("rope_type", part.get("type")): part for part in given}
    return {kind: part for kind, part in found.items() if kind in _ROTATIONS}


def refuse_rotations(kinds: Any, policy: str) -> None:
    """Raise UnsupportedFeature for rotations of these types. policy: the policy's name."""
    raise UnsupportedFeature(
        f"{policy}: on vLLM's Transformers backend, a rotation of type {', '.join(sorted(kinds))} depends on the "
        "longest request of the batch. Use --model-impl vllm if vLLM has the model, or set BI_PATCH=0"
    )
