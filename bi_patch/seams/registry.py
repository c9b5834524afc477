"""All seams, settings and policies, collected from the modules of the areas, in a fixed order."""

from bi_patch.seams import (
    attention,
    communicator,
    compilation,
    engine,
    linear,
    moe,
    norm,
    quantization,
    sampling,
    scheduler,
)
from bi_patch.seams.model import Policy, Seam, Setting

# The releases that the seams were written for and are checked against; any other is refused.
RELEASES = ("0.23.0", "0.26.0", "0.32.0", "0.33.0")
# And where: the seams of a platform may begin later than the project.
PLATFORM_RELEASES = {"cpu": ">=0.32,<0.34", "cuda": ">=0.23,<0.34", "ascend": "==0.23.*"}

AREAS = (engine, compilation, scheduler, linear, norm, moe, attention, sampling, communicator, quantization)


def _collect(attribute: str) -> tuple:
    return tuple(item for area in AREAS for item in getattr(area, attribute, ()))


SEAMS: tuple[Seam, ...] = _collect("SEAMS")
SETTINGS: tuple[Setting, ...] = _collect("SETTINGS")
POLICIES: tuple[Policy, ...] = _collect("POLICIES")

_names = [item.name for item in SEAMS + SETTINGS + POLICIES]
assert len(_names) == len(set(_names)), "two seams share a name"
