"""Seams of collectives between ranks. The feature table refuses more than one rank on CPU.

On CUDA the safe form: upstream's mode runs one order for every message size (its one-stage all-reduce, or NCCL pinned
to one algorithm and channel); what would go round it is off or refused.
"""

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams.model import Policy, Variable


def _no_fusion(config) -> None:
    passes = config.compilation_config.pass_config
    if getattr(passes, "fuse_allreduce_rms", False):
        passes.fuse_allreduce_rms = False
    found = [name for name in ("enable_sp", "fuse_gemm_comms") if getattr(passes, name, False)]
    if found and config.parallel_config.tensor_parallel_size > 1:
        raise UnsupportedFeature(
            f"communicator.fusion: {', '.join(found)} scatters sums by the number of tokens. "
            "Turn it off in the compilation config, or set BI_PATCH=0"
        )


def _whole_lines(config) -> None:
    parallel = config.parallel_config
    if parallel.tensor_parallel_size == 1 or parallel.disable_custom_all_reduce:
        return
    width = config.model_config.get_hidden_size()
    if width % 8:
        raise UnsupportedFeature(
            f"communicator.width: rows of {width} elements are not whole 16-byte lines, so the all-reduce kernel would "
            "be chosen by the number of tokens. Run it on one device, or pass disable_custom_all_reduce=True, or set "
            "BI_PATCH=0"
        )


VARIABLES = (
    Variable(
        name="communicator.one_stage",
        variable="VLLM_CUSTOM_ALLREDUCE_ALGO",
        value="1stage",
        why="the two-stage all-reduce is chosen by message size and sums in another order",
    ),
    Variable(
        name="communicator.symmetric_memory",
        variable="VLLM_ALLREDUCE_USE_SYMM_MEM",
        value="0",
        why="symmetric-memory all-reduce is chosen by message size and sums in the switch",
    ),
    Variable(
        name="communicator.flashinfer",
        variable="VLLM_ALLREDUCE_USE_FLASHINFER",
        value="0",
        why="FlashInfer's all-reduce is chosen by message size",
    ),
)

POLICIES = (
    Policy(
        name="communicator.width",
        apply=_whole_lines,
        why="vLLM's all-reduce serves messages of whole 16-byte lines and leaves the others, by their size, to NCCL",
        releases=">=0.32",
    ),
    Policy(
        name="communicator.fusion",
        apply=_no_fusion,
        why="all-reduce fused with RMSNorm, and sequence parallelism, sum in an order set by the number of tokens",
    ),
)
