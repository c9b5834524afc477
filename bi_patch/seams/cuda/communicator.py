"""Rules for collectives between ranks on CUDA. On CPU, the feature table refuses more than one rank.

Upstream's mode adds in one order for every message size: with its one-stage all-reduce, or with NCCL pinned to one
algorithm and one channel. These rules turn off or refuse whatever would take another collective.
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
            f"communicator.fusion: with {', '.join(found)}, the number of tokens decides how ranks share a sum. "
            "Turn it off in the compilation config, or set BI_PATCH=0"
        )


def _whole_lines(config) -> None:
    parallel = config.parallel_config
    if parallel.tensor_parallel_size == 1 or parallel.disable_custom_all_reduce:
        return
    width = config.model_config.get_hidden_size()
    if width % 8:
        raise UnsupportedFeature(
            f"communicator.width: rows of {width} elements do not fill whole 16-byte lines, so the number of tokens "
            "would decide which all-reduce kernel runs. Use one device, pass disable_custom_all_reduce=True, or set "
            "BI_PATCH=0"
        )


VARIABLES = (
    Variable(
        name="communicator.one_stage",
        variable="VLLM_CUSTOM_ALLREDUCE_ALGO",
        value="1stage",
        why="vLLM takes its two-stage all-reduce for large messages, and this kernel sums in another order",
    ),
    Variable(
        name="communicator.symmetric_memory",
        variable="VLLM_ALLREDUCE_USE_SYMM_MEM",
        value="0",
        why="vLLM takes the symmetric-memory all-reduce for some message sizes, and the switch sums in an order of its "
        "own",
    ),
    Variable(
        name="communicator.flashinfer",
        variable="VLLM_ALLREDUCE_USE_FLASHINFER",
        value="0",
        why="vLLM takes FlashInfer's all-reduce for some message sizes only",
    ),
)

POLICIES = (
    Policy(
        name="communicator.width",
        apply=_whole_lines,
        why="vLLM's all-reduce needs messages of whole 16-byte lines. Other messages go to NCCL, and with rows of such "
        "a width the number of tokens decides whether a message fills whole lines",
        releases=">=0.32",
    ),
    Policy(
        name="communicator.fusion",
        apply=_no_fusion,
        why="all-reduce fused with RMSNorm and sequence parallelism sum in an order that depends on the number of "
        "tokens",
    ),
)
