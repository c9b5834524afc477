"""Seams of mixture-of-experts layers."""

import functools

from bi_patch.seams.model import Seam, Target


def _register(original):
    """CPUUnquantizedExperts.process_weights_after_loading: the packed layer's row order is certified after load."""

    @functools.wraps(original)
    def process_weights_after_loading(self, layer):
        from bi_patch.ops.cpu import rows

        result = original(self, layer)
        rows.register_moe(self, layer)
        return result

    return process_weights_after_loading


def _support(original):
    """FusedMoEExperts._supports_batch_invariance: the unquantized CPU experts are certified, so they may be chosen."""

    def _supports_batch_invariance(cls) -> bool:
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

        return issubclass(cls, CPUUnquantizedExperts) or original.__func__()

    return classmethod(_supports_batch_invariance)


def _routing(original):
    """_softmax_topk of the CPU router: the bundled kernel, compiled or not."""
    from bi_patch.ops.cpu import machine, moe

    def _softmax_topk(router_logits, top_k, renormalize):
        if not machine.covers(router_logits):
            return original(router_logits, top_k, renormalize)
        return moe.softmax_topk(router_logits, top_k, renormalize)

    return _softmax_topk


SEAMS = (
    Seam(
        name="moe.cpu_support",
        targets=(
            Target(
                "vllm.model_executor.layers.fused_moe.modular_kernel",
                "FusedMoEExperts._supports_batch_invariance",
            ),
        ),
        close=_support,
        why="upstream's mode refuses every CPU MoE kernel",
        how="the unquantized CPU experts may be chosen; moe.cpu_experts certifies them",
        until="upstream's mode supports CPU",
    ),
    Seam(
        name="moe.cpu_experts",
        targets=(
            Target(
                "vllm.model_executor.layers.fused_moe.experts.cpu_moe",
                "CPUUnquantizedExperts.process_weights_after_loading",
            ),
        ),
        close=_register,
        why="a grouped GEMM that tiles by the tokens of an expert can reduce in another order with the batch",
        how="the kernel is kept and its row order certified for the model's experts",
        until="upstream states one order for its CPU MoE",
        causes=(10, 13),
        serves=("FusedMoE", "MoERunner", "RoutedExperts", "FusedMoEExperts"),
    ),
    Seam(
        name="moe.cpu_routing",
        targets=(Target("vllm.model_executor.layers.fused_moe.router.cpu_router", "_softmax_topk"),),
        close=_routing,
        why="compiled code computes another exponential than eager code; which of two tied experts is taken is open",
        how="one bundled kernel: ties by the lower expert, one order of the sum",
        until="upstream states both",
        causes=(13, 17),
    ),
)
