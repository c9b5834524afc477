"""Rules for collectives between ranks on CUDA.

Upstream's mode adds in one order for every message size: with its one-stage all-reduce, or with NCCL pinned to one
algorithm and one channel. These rules turn off or refuse whatever would take another collective. NCCL may read its
variables before vLLM sets them, e.g. for a trainer in the same process, so each worker checks the order at its start.
"""

import functools

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import ranks
from bi_patch.seams.model import Policy, Seam, Target, Variable

# What upstream's mode sets so that NCCL adds in one order.
_PINS = (
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NCCL_MIN_NCHANNELS",
    "NCCL_MAX_NCHANNELS",
    "NCCL_NTHREADS",
    "NCCL_NVLS_ENABLE",
    "NCCL_COLLNET_ENABLE",
    "NCCL_P2P_NET_DISABLE",
    "NCCL_SOCKET_NTHREADS",
)


def _no_fused_norm(original):
    """_can_use_flashinfer of fused_allreduce_gemma_rms_norm: never, because it depends on the number of tokens."""

    @functools.wraps(original)
    def _can_use_flashinfer(*args, **kwargs):
        return False, 0

    return _can_use_flashinfer


_TODO = (
    "Probably NCCL was in use in this process before vLLM fixed NCCL's order, e.g. by "
    "a trainer. Leave vLLM's own all-reduce on (disable_custom_all_reduce=False); or set "
    "NCCL_ALGO=allreduce:tree, NCCL_PROTO=Simple, NCCL_MIN_NCHANNELS=1, NCCL_MAX_NCHANNELS=1 and "
    "NCCL_NVLS_ENABLE=0 before the process starts; or use one device, or set BI_PATCH=0"
)


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
            "would decide which all-reduce kernel runs. Use one device, or set BI_PATCH=0. Or pass "
            "disable_custom_all_reduce=True, so that NCCL adds all messages; then NCCL must not be in use in this "
            "process before vLLM starts (communicator.cuda_order checks it)"
        )


SEAMS = (
    Seam(
        name="communicator.fused_norm",
        targets=(
            Target(
                "vllm.model_executor.layers.fused_allreduce_gemma_rms_norm", "_can_use_flashinfer", releases=">=0.26"
            ),
        ),
        close=_no_fused_norm,
        why="some models add over ranks inside FlashInfer's norm, up to a number of tokens, also in upstream's mode",
        how="these models take the all-reduce and the norm that others take",
        until="upstream's mode closes this path",
        causes=(15,),
        on_import=True,
    ),
    Seam(
        name="communicator.cuda_order",
        targets=(
            Target(
                "vllm.v1.worker.gpu_worker",
                "init_worker_distributed_environment",
                copies=("vllm.v1.worker.cpu_worker", "vllm.v1.worker.xpu_worker"),
            ),
        ),
        close=ranks.closing("communicator.cuda_order", False, _TODO),
        why="NCCL chooses the order of a sum by the size of the message, unless upstream's mode fixes the order before "
        "the process uses NCCL",
        how="each worker compares sums over ranks of 1 row up to the largest step bitwise, and stops if the order "
        "moves",
        until="never: this patch point checks the order",
        causes=(14,),
    ),
)

VARIABLES = (
    Variable(
        name="communicator.nccl_reread",
        variable="NCCL_NO_CACHE",
        value=",".join(_PINS),
        force=False,
        why="NCCL 2.29.7 and later reads these variables again for each communicator, so that upstream's mode fixes "
        "the order although a trainer in the same process used NCCL before",
    ),
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
