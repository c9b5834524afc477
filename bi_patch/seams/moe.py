"""Seams of mixture-of-experts layers."""

import functools

from bi_patch.seams.model import Seam, Target

_CPU_RELEASES = ">=0.32,<0.34"


def _cpu_register(original):
    """CPUUnquantizedExperts.process_weights_after_loading: the packed layer's row order is certified after load."""

    @functools.wraps(original)
    def process_weights_after_loading(self, layer):
        from bi_patch.orders import rows

        result = original(self, layer)
        rows.register_moe(self, layer)
        return result

    return process_weights_after_loading


def _cpu_support(original):
    """FusedMoEExperts._supports_batch_invariance: the unquantized CPU experts are certified, so they may be chosen."""

    def _supports_batch_invariance(cls) -> bool:
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

        return issubclass(cls, CPUUnquantizedExperts) or original.__func__()

    return classmethod(_supports_batch_invariance)


SEAMS = (
    Seam(
        name="moe.cpu_support",
        targets=(
            Target(
                "vllm.model_executor.layers.fused_moe.modular_kernel",
                "FusedMoEExperts._supports_batch_invariance",
                _CPU_RELEASES,
            ),
        ),
        close=_cpu_support,
        why="upstream's mode refuses every CPU MoE kernel",
        how="the unquantized CPU experts may be chosen; moe.cpu_experts certifies them",
        until="upstream's mode supports CPU",
        platforms=frozenset({"cpu"}),
    ),
    Seam(
        name="moe.cpu_experts",
        targets=(
            Target(
                "vllm.model_executor.layers.fused_moe.experts.cpu_moe",
                "CPUUnquantizedExperts.process_weights_after_loading",
                _CPU_RELEASES,
            ),
        ),
        close=_cpu_register,
        why="a grouped GEMM that tiles by the tokens of an expert can reduce in another order with the batch",
        how="the kernel is kept and its row order certified for the model's experts",
        until="upstream states one order for its CPU MoE",
        platforms=frozenset({"cpu"}),
        causes=(10, 13),
    ),
)
