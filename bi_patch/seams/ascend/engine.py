"""vLLM-Ascend's own mode, its custom operators, and options that bi_patch refuses."""

from bi_patch.seams.ascend.common import option, refuse
from bi_patch.seams.ascend.compilation import FUSIONS
from bi_patch.seams.model import Policy, Seam, Target


def _mode(original):
    """init_batch_invariance: install the dispatch table, or raise. Upstream's function goes on without its kernels."""

    def init_batch_invariance():
        import torch
        from vllm_ascend.ascend_config import get_ascend_config

        from bi_patch.ops import vector_math
        from bi_patch.ops.ascend import dispatch

        vector_math.settle()  # some tables are computed on the host
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
    """enable_custom_op: False, because vLLM-Ascend's C++ operators state no order."""

    def enable_custom_op() -> bool:
        return False

    return enable_custom_op


def _no_warm_up(original):
    """NPUWorker._warm_up_atb: do nothing. The dispatch table refuses its product, and nothing reads the result."""

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
        why="upstream's mode leaves many operators as they are, and only warns if its kernels are missing",
        how="bi_patch serves every operator that sums in one order, or refuses the operator by name. A missing library "
        "is an error",
        until="upstream's mode covers these operators and stops if it cannot "
        "(https://github.com/vllm-project/vllm-ascend/issues/5487)",
        causes=(1, 2, 3, 10, 17),
    ),
    Seam(
        name="engine.ascend_custom_ops",
        targets=(Target("vllm_ascend.utils", "enable_custom_op", copies=_CUSTOM_COPIES),),
        close=_no_custom_ops,
        why="vLLM-Ascend's C++ operators avoid bi_patch's dispatch table",
        how="these operators stay off, so vLLM-Ascend calls torch_npu's operators, which the table serves",
        until="these operators state their order",
        causes=(2, 10),
    ),
    Seam(
        name="engine.ascend_warm_up",
        targets=(Target("vllm_ascend.worker.worker", "NPUWorker._warm_up_atb"),),
        close=_no_warm_up,
        why="vLLM-Ascend warms up a library with a product in an order of its own, and the dispatch table refuses this "
        "product",
        how="bi_patch leaves the product out. Nothing uses its result, and the first step loads the library",
        until="vLLM-Ascend warms up with an operator that only moves rows",
        causes=(2, 10),
    ),
)

POLICIES = (
    Policy(
        name="engine.ascend_options", apply=_options, why="these options use operators for which bi_patch has no kernel"
    ),
)
