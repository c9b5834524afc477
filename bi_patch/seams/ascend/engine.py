"""vLLM-Ascend's own mode, its custom operators, and the features that no closed seam covers."""

from bi_patch.seams.ascend.common import option, refuse
from bi_patch.seams.ascend.compilation import FUSIONS
from bi_patch.seams.model import Policy, Seam, Target


def _mode(original):
    """init_batch_invariance: our routes, or an error. Upstream's goes on without what is missing."""

    def init_batch_invariance():
        import torch
        from vllm_ascend.ascend_config import get_ascend_config

        from bi_patch.ops.ascend import dispatch

        config = get_ascend_config()
        config.weight_nz_mode = 0
        config.enable_matmul_allreduce = False
        for name in FUSIONS:
            if hasattr(config.ascend_compilation_config, name):
                setattr(config.ascend_compilation_config, name, False)
        torch.use_deterministic_algorithms(True, warn_only=True)
        dispatch.install()

    return init_batch_invariance


def _no_custom_ops(original):
    """enable_custom_op: never; vLLM-Ascend's C++ operators state no order."""

    def enable_custom_op() -> bool:
        return False

    return enable_custom_op


def _no_warm_up(original):
    """NPUWorker._warm_up_atb: nothing. Its product, which nobody reads, is an operator that the table refuses."""

    def _warm_up_atb(self) -> None:
        pass

    return _warm_up_atb


def _options(config) -> None:
    refuse(
        "engine.ascend_options",
        [name for name in _REFUSED_OPTIONS if option(config, name)],
        "Take it out of --additional-config",
    )


_REFUSED_OPTIONS = (
    "xlite_graph_config.enabled",
    "enable_reduce_sample",
    "enable_kv_nz",
    "enable_mlapo",
    "enable_fused_mc2",
    "multistream_overlap_gate",
    "enable_npugraph_ex",
    "ascend_compilation_config.enable_npugraph_ex",
    "eplb_config.dynamic_eplb",
    "layer_sharding",
    "enable_shared_expert_dp",
)
_CUSTOM_COPIES = (
    "vllm_ascend.ops.layernorm",
    "vllm_ascend.ops.fused_moe.moe_mlp",
)

SEAMS = (
    Seam(
        name="engine.ascend_mode",
        targets=(
            Target(
                "vllm_ascend.batch_invariant",
                "init_batch_invariance",
                copies=("vllm_ascend.worker.worker",),
            ),
        ),
        close=_mode,
        why="upstream's mode leaves many operators open, and goes on with a warning when its kernels are missing",
        how="every operator that sums is served in one order or refused by name; a missing library is an error",
        until="upstream's mode covers them and fails closed",
        causes=(1, 2, 3, 10, 17),
    ),
    Seam(
        name="engine.ascend_custom_ops",
        targets=(Target("vllm_ascend.utils", "enable_custom_op", copies=_CUSTOM_COPIES),),
        close=_no_custom_ops,
        why="vLLM-Ascend's C++ operators go round the dispatcher's table",
        how="they stay off, so that torch_npu's are called, which the table serves",
        until="they state their order",
        causes=(2, 10),
    ),
    Seam(
        name="engine.ascend_warm_up",
        targets=(Target("vllm_ascend.worker.worker", "NPUWorker._warm_up_atb"),),
        close=_no_warm_up,
        why="it warms a library up by a product in an order of its own, which the table refuses",
        how="left out: its result is thrown away; the first step loads the library instead",
        until="upstream warms up by an operator that only moves rows",
        causes=(2, 10),
    ),
)

POLICIES = (
    Policy(name="engine.ascend_options", apply=_options, why="these options take operators that no route serves"),
)
