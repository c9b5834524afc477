"""Collectives on Ascend: HCCL and LCCL strict; what fuses a product with a collective is off or refused."""

from bi_patch.seams.ascend.common import ASCEND, option, refuse
from bi_patch.seams.model import Policy, Setting

SEAMS = ()

_ARRIVAL = "sums are taken in an order of arrival otherwise"

SETTINGS = (
    Setting("communicator.ascend_hccl", "HCCL_DETERMINISTIC", "strict", _ARRIVAL, ASCEND),
    Setting("communicator.ascend_lccl", "LCCL_DETERMINISTIC", "1", _ARRIVAL, ASCEND),
    Setting("communicator.ascend_matmul", "VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE", "0",
            "a product fused with its all-reduce goes round the table", ASCEND),
    Setting("communicator.ascend_flashcomm", "VLLM_ASCEND_ENABLE_FLASHCOMM1", "0",
            "sequence parallelism scatters sums by the number of tokens", ASCEND),
)  # fmt: skip


def _fused(config) -> None:
    refuse(
        "communicator.ascend_fused",
        [name for name in _OPTIONS if option(config, name)],
        "Take it out of --additional-config",
    )
    passes = config.compilation_config.pass_config
    found = [
        name
        for name in ("enable_sp", "fuse_gemm_comms", "fuse_allreduce_rms")
        if getattr(passes, name, False)
    ]
    if config.parallel_config.tensor_parallel_size > 1:
        refuse("communicator.ascend_fused", found)


_OPTIONS = (
    "enable_matmul_allreduce", "enable_flashcomm1", "enable_flashcomm2_parallel_size", "finegrained_tp_config",
    "weight_nz_mode", "enable_prefill_mc2", "enable_mc2_hierarchy_comm",
)  # fmt: skip

POLICIES = (
    Policy(
        "communicator.ascend_fused",
        _fused,
        "fused collectives sum in an order that follows the batch",
        ASCEND,
    ),
)
