"""Seams of torch.compile: compiled code is never shared between stock, armed, and another bi_patch."""

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Policy, Seam, Target, Variable


def _no_breakable(original):
    """VllmConfig._uses_breakable_cudagraph_for_batch_invariance: our tiles need no lookup at capture."""

    def _uses_breakable_cudagraph_for_batch_invariance(self) -> bool:
        return False

    return _uses_breakable_cudagraph_for_batch_invariance


def _refuse_sizes(config) -> None:
    sizes = getattr(config.compilation_config, "compile_sizes", None)
    if sizes:
        raise UnsupportedFeature(
            f"compilation.cuda_sizes: compile_sizes {sizes} gives these numbers of tokens kernels of their own, which "
            "may sum in another order. Leave compile_sizes out, or set BI_PATCH=0"
        )


SEAMS = (
    Seam(
        name="compilation.cuda_breakable",
        targets=(Target("vllm.config.vllm", "VllmConfig._uses_breakable_cudagraph_for_batch_invariance", ">=0.32"),),
        close=_no_breakable,
        why="upstream's mode turns torch.compile off where it has tuned tiles",
        how="compilation and full CUDA graphs stay on: the linear op looks its route up by itself",
        until="upstream's mode keeps torch.compile",
    ),
)

VARIABLES = (
    Variable(
        name="compilation.cuda_deterministic",
        variable="TORCHINDUCTOR_DETERMINISTIC",
        value="1",
        why="a reduction that is autotuned in each process can change bits at a restart",
    ),
)

POLICIES = (
    Policy(
        name="compilation.cuda_sizes",
        apply=_refuse_sizes,
        why="a size that is compiled apart is tuned apart",
    ),
)
