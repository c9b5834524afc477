"""Collectives on Ascend: HCCL and LCCL run in strict mode. Fused products and collectives are off or refused."""

from bi_patch.seams.ascend.common import option, refuse
from bi_patch.seams.model import Policy, Variable

SEAMS = ()

_ARRIVAL = "otherwise the library adds the ranks' parts in the order in which they arrive"

VARIABLES = (
    Variable(name="communicator.ascend_hccl", variable="HCCL_DETERMINISTIC", value="strict", why=_ARRIVAL),
    Variable(name="communicator.ascend_lccl", variable="LCCL_DETERMINISTIC", value="1", why=_ARRIVAL),
    Variable(
        name="communicator.ascend_matmul",
        variable="VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE",
        value="0",
        why="a product that is fused with its all-reduce avoids bi_patch's dispatch table",
    ),
    Variable(
        name="communicator.ascend_flashcomm",
        variable="VLLM_ASCEND_ENABLE_FLASHCOMM1",
        value="0",
        why="with sequence parallelism, the number of tokens decides how ranks share a sum",
    ),
)


def _fused(config) -> None:
    refuse(
        "communicator.ascend_fused",
        [name for name in _OPTIONS if option(config, name)],
        "Take it out of --additional-config",
    )
    passes = config.compilation_config.pass_config
    found = [name for name in ("enable_sp", "fuse_gemm_comms", "fuse_allreduce_rms") if getattr(passes, name, False)]
    if config.parallel_config.tensor_parallel_size > 1:
        refuse("communicator.ascend_fused", found)


_OPTIONS = (
    "enable_matmul_allreduce",
    "enable_flashcomm1",
    "enable_flashcomm2_parallel_size",
    "finegrained_tp_config",
    "weight_nz_mode",
    "enable_prefill_mc2",
    "enable_mc2_hierarchy_comm",
)

POLICIES = (
    Policy(
        name="communicator.ascend_fused",
        apply=_fused,
        why="fused collectives sum in an order that depends on the batch",
    ),
)
