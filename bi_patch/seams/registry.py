"""All seams, settings and policies, collected from the modules of the areas, in a fixed order."""

from bi_patch.seams import (
    activation,
    attention,
    communicator,
    compilation,
    engine,
    linear,
    models,
    moe,
    norm,
    quantization,
    requests,
    rotary,
    sampling,
    scheduler,
)
from bi_patch.seams.ascend import (
    attention as ascend_attention,
)
from bi_patch.seams.ascend import (
    communicator as ascend_communicator,
)
from bi_patch.seams.ascend import (
    compilation as ascend_compilation,
)
from bi_patch.seams.ascend import (
    engine as ascend_engine,
)
from bi_patch.seams.ascend import (
    moe as ascend_moe,
)
from bi_patch.seams.ascend import (
    norm as ascend_norm,
)
from bi_patch.seams.ascend import (
    quantization as ascend_quantization,
)
from bi_patch.seams.ascend import (
    rotary as ascend_rotary,
)
from bi_patch.seams.ascend import (
    sampling as ascend_sampling,
)
from bi_patch.seams.ascend import (
    scheduler as ascend_scheduler,
)
from bi_patch.seams.model import CPU_RELEASES, Policy, Seam, Setting

# The releases that the seams were written for and are checked against; any other is refused.
RELEASES = ("0.23.0", "0.26.0", "0.32.0", "0.33.0")
# The packages that hold seams: the distribution of each, and its releases. A plugin's release has the number of vLLM's.
PACKAGES = {"vllm": ("vllm", RELEASES), "vllm_ascend": ("vllm-ascend", ("0.23.0",))}
# And where: the seams of a platform may begin later than the project.
PLATFORM_RELEASES = {"cpu": CPU_RELEASES, "cuda": ">=0.23,<0.34", "ascend": "==0.23.*"}

AREAS = (
    engine, compilation, scheduler, linear, norm, activation, rotary, moe, attention, sampling, communicator,
    quantization, requests, models,
)  # fmt: skip
# The same areas again, of vLLM-Ascend.
AREAS += (
    ascend_engine, ascend_compilation, ascend_scheduler, ascend_norm, ascend_moe, ascend_attention, ascend_sampling,
    ascend_communicator, ascend_quantization, ascend_rotary,
)  # fmt: skip


def _collect(attribute: str) -> tuple:
    return tuple(item for area in AREAS for item in getattr(area, attribute, ()))


SEAMS: tuple[Seam, ...] = _collect("SEAMS")
SETTINGS: tuple[Setting, ...] = _collect("SETTINGS")
POLICIES: tuple[Policy, ...] = _collect("POLICIES")

_names = [item.name for item in SEAMS + SETTINGS + POLICIES]
assert len(_names) == len(set(_names)), "two seams share a name"
