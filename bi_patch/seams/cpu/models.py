"""Rules on models: refuse a model whose own code depends on the batch and that no seam reaches."""

from bi_patch.seams import models
from bi_patch.seams.model import Policy


def _refuse_own_package(config) -> None:
    models.refuse_own_package(config, "models.cpu")


def _refuse_rotations(config) -> None:
    model = config.model_config
    found = {
        kind
        for kind, given in models.dynamic_rotations(model).items()
        if model.max_model_len > _constant_up_to(model.hf_text_config, given)
    }
    if found:
        models.refuse_rotations(found, "models.cpu_rotation")


def _constant_up_to(config, given: dict) -> int:
    """The longest request for which Hugging Face never changes a dynamic rotation."""
    return given.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", 0)


POLICIES = (
    Policy(
        name="models.cpu",
        apply=_refuse_own_package,
        why="a model with a package of its own may compute something that no patch point reaches",
    ),
    Policy(
        name="models.cpu_rotation",
        apply=_refuse_rotations,
        why="beyond the length of its training, a dynamic rotation depends on the longest position of the whole batch",
    ),
)
