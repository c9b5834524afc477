"""Rules on models: what a model computes by itself, past every seam, and by what is beside it, is refused on CUDA."""

from collections.abc import Callable

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Policy

# Architecture -> why it is refused.
_REFUSED = {
    "HrmTextForCausalLM": "a preempted request's prompt is computed anew with sight of its answer",
}


# The same, where vLLM compiles nothing (--enforce-eager, -O0).
_REFUSED_EAGER = dict.fromkeys(
    ("CohereForCausalLM", "Cohere2ForCausalLM", "Cohere2MoeForCausalLM"),
    "its norms are compiled apart then, by the number of tokens",
)


_REFUSED_EAGER_BEFORE_0_33 = {"Gemma3nForCausalLM": "the number of tokens picks how its standard deviations are summed"}


# Rotations that Hugging Face's code makes from the longest position of the whole batch.
_ROTATIONS = ("dynamic", "longrope")


def _refuse(config, reason: Callable[[str], str | None], where: str = "") -> None:
    """Raise UnsupportedFeature where `reason` has one for an architecture of the model."""
    for name in config.model_config.architectures if config.model_config is not None else ():
        if why := reason(name):
            raise UnsupportedFeature(
                f"models.cuda: {name} is not covered{where}: {why}. Use another model, or set BI_PATCH=0"
            )


def _refuse_models(config) -> None:
    _refuse(config, _REFUSED.get)
    _refuse(config, _own_package)
    _refuse(config, _uncertified(config.model_config).get)
    if _compiles_nothing(config):
        _refuse(config, _REFUSED_EAGER.get, " without compilation")


def _refuse_models_before_0_33(config) -> None:
    if _compiles_nothing(config):
        _refuse(config, _REFUSED_EAGER_BEFORE_0_33.get, " without compilation")


def _compiles_nothing(config) -> bool:
    mode = getattr(config.compilation_config, "mode", None)
    return getattr(mode, "name", mode) in ("NONE", 0)


def _own_package(name: str) -> str | None:
    """A reason for what vLLM keeps outside its layers, in vllm.models."""
    from vllm.model_executor.models.registry import ModelRegistry

    module = getattr(ModelRegistry.models.get(name), "module_name", "")
    return "its package has kernels of its own, chosen by the batch" if module.startswith("vllm.models.") else None


def _uncertified(model) -> dict[str, str]:
    """MiniCPM's experts, whose weights have names of their own, if it has experts."""
    experts = getattr(getattr(model, "hf_text_config", None), "num_experts", 0)
    return {"MiniCPMForCausalLM": "its experts' tiles are not certified"} if experts else {}


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
        apply=_refuse_models,
        why="a model may compute something by itself that no seam reaches",
    ),
    Policy(
        name="models.cuda_before_0_33",
        apply=_refuse_models_before_0_33,
        why="a model may compute something by itself that no seam reaches",
        releases="<0.33",
    ),
    Policy(
        name="models.cuda_rotation",
        apply=_refuse_rotations,
        why="Hugging Face's dynamic rotations follow the longest position of the whole batch",
    ),
)
