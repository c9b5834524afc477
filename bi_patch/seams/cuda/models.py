"""Rules on models: what a model computes by itself, past every seam, and by what is beside it, is refused.

Models that are refused by their name stand in the feature table; the rules here look at what vLLM loads for a model.
"""

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Policy

# Rotations that Hugging Face's code makes from the longest position of the whole batch.
_ROTATIONS = ("dynamic", "longrope")


def _refuse_own_package(config) -> None:
    """Refuse a model that vLLM keeps outside its layers, in vllm.models."""
    from vllm.model_executor.models.registry import ModelRegistry

    for name in config.model_config.architectures if config.model_config is not None else ():
        module = getattr(ModelRegistry.models.get(name), "module_name", "")
        if module.startswith("vllm.models."):
            raise UnsupportedFeature(
                f"models.cuda: {name} is not covered: its package has kernels of its own, chosen by the batch. "
                "Use another model, or set BI_PATCH=0"
            )


def _refuse_rotations(config) -> None:
    model = config.model_config
    if model is None or not model.using_transformers_backend():
        return
    held = [getattr(model.hf_text_config, name, None) for name in ("rope_parameters", "rope_scaling")]
    given = [part for part in held if isinstance(part, dict)]
    given += [part for parts in given for part in parts.values() if isinstance(part, dict)]  # one a kind of layer
    found = {part.get("rope_type", part.get("type")) for part in given} & set(_ROTATIONS)
    if found:
        raise UnsupportedFeature(
            f"models.cuda_rotation: on vLLM's Transformers backend a rotation of type {', '.join(sorted(found))} "
            "follows the longest request of the batch. Use --model-impl vllm where vLLM has the model, or set "
            "BI_PATCH=0"
        )


POLICIES = (
    Policy(
        name="models.cuda",
        apply=_refuse_own_package,
        why="a model may compute something by itself that no seam reaches",
    ),
    Policy(
        name="models.cuda_rotation",
        apply=_refuse_rotations,
        why="Hugging Face's dynamic rotations follow the longest position of the whole batch",
    ),
)
