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


SEAMS = (
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
