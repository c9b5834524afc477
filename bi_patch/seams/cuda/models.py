"""Rules on models: refuse a model whose own code depends on the batch and that no seam reaches.

The feature table lists the models that bi_patch refuses by name. These rules look at what vLLM loads for a model.
"""

from bi_patch.seams import models
from bi_patch.seams.model import Policy


def _refuse_own_package(config) -> None:
    models.refuse_own_package(config, "models.cuda")


def _refuse_rotations(config) -> None:
    models.refuse_rotations(config, "models.cuda_rotation")


POLICIES = (
    Policy(
        name="models.cuda",
        apply=_refuse_own_package,
        why="a model with a package of its own may compute something that no patch point reaches",
    ),
    Policy(
        name="models.cuda_rotation",
        apply=_refuse_rotations,
        why="beyond a limit, Hugging Face's dynamic rotations depend on the longest position of the whole batch",
    ),
)
