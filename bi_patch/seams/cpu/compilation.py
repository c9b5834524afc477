"""torch.compile on CPU: every number of tokens runs the same compiled code."""

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Policy


def _refuse_sizes(config) -> None:
    sizes = getattr(config.compilation_config, "compile_sizes", None)
    if sizes:
        raise UnsupportedFeature(
            f"compilation.cpu_sizes: compile_sizes {sizes} makes separate code for these numbers of tokens, and such "
            "code may sum in another order. Leave compile_sizes out, or set BI_PATCH=0"
        )


POLICIES = (
    Policy(
        name="compilation.cpu_sizes",
        apply=_refuse_sizes,
        why="vLLM compiles separate code for each of these sizes",
    ),
)
