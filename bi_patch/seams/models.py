"""Rules on models, for several platforms: refuse a model whose own code depends on the batch and that no seam reaches.

The feature table lists the models that bi_patch refuses by name. These rules look at what vLLM loads for a model: is
its code outside of vLLM's common layers, and how does it rotate?
"""

from __future__ import annotations

import functools
from typing import Any

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import packages
from bi_patch.seams.model import Policy

# Rotation types that Hugging Face's code computes anew once a position of the batch passes a limit, and the limit.
_LIMITS = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}


def policies(platform: str) -> tuple[Policy, ...]:
    """The rules of a platform, with its name in theirs."""
    return (
        Policy(
            name=f"models.{platform}",
            apply=functools.partial(_refuse_own_package, policy=f"models.{platform}", platform=platform),
            why="a model with a package of its own may compute something that no patch point reaches",
        ),
        Policy(
            name=f"models.{platform}_rotation",
            apply=functools.partial(_refuse_rotations, policy=f"models.{platform}_rotation"),
            why="beyond a limit, Hugging Face's dynamic rotations depend on the longest position of the whole batch",
        ),
    )


def cured(found: str) -> str:
    """What is not covered of a model, with what to do: the advice that the words bring, or another model."""
    return f"{found}{'' if '. ' in found else '. Use another model'}, or set BI_PATCH=0"


def _refuse_own_package(config: Any, policy: str, platform: str) -> None:
    """Refuse a model whose code vLLM keeps in vllm.models, outside of its common layers. policy: the policy's name."""
    from vllm.model_executor.models.registry import ModelRegistry

    for name in config.model_config.architectures if config.model_config is not None else ():
        module = getattr(ModelRegistry.models.get(name), "module_name", "")
        found = packages.reason(module, name, platform)
        if found:
            raise UnsupportedFeature(f"{policy}: bi_patch does not cover {name}: {cured(found)}")


def _refuse_rotations(config: Any, policy: str) -> None:
    """Refuse a rotation that some request of the engine can change for others. policy: the policy's name.

    Only models of vLLM's Transformers backend run Hugging Face's rotations.
    """
    model = config.model_config
    if model is None or not model.using_transformers_backend():
        return
    held = [getattr(model.hf_text_config, name, None) for name in ("rope_parameters", "rope_scaling")]
    given = [part for part in held if isinstance(part, dict)]
    # Some models have one set for each kind of layer.
    given += [part for parts in given for part in parts.values() if isinstance(part, dict)]
    found = {name for part in given if (name := _moving(model, part))}
    if found:
        raise UnsupportedFeature(
            f"{policy}: on vLLM's Transformers backend, a rotation of type {', '.join(sorted(found))} depends on the "
            "longest request of the batch. Use --model-impl vllm if vLLM has the model, or a --max-model-len of at "
            f"most the model's {' or '.join(_LIMITS[name] for name in sorted(found))}, or set BI_PATCH=0"
        )


def _moving(model: Any, rotation: dict) -> str:
    """The type of a rotation that some request of the engine can change for others, else "".

    model: vllm.config.ModelConfig. rotation: one set of the model's `rope_parameters`.
    """
    name = rotation.get("rope_type", rotation.get("type"))
    if name not in _LIMITS:
        return ""
    field = _LIMITS[name]
    known = (rotation.get("original_max_position_embeddings"), getattr(model.hf_text_config, field, None))
    limits = [limit for limit in known if limit]
    return "" if limits and model.max_model_len <= min(limits) else name
