"""Mixture-of-experts layers: certificates for the experts, and a bundled router."""

import functools

from bi_patch.seams.model import Seam, Target


def _register(original):
    """CPUUnquantizedExperts.process_weights_after_loading: note the packed layer, so that load_model certifies it."""

    @functools.wraps(original)
    def process_weights_after_loading(self, layer):
        from bi_patch.ops.cpu import rows

        result = original(self, layer)
        rows.register_moe(self, layer)
        return result

    return process_weights_after_loading


def _support(original):
    """FusedMoEExperts._supports_batch_invariance: True for unquantized CPU experts, which moe.cpu_experts certifies."""

    def _supports_batch_invariance(cls) -> bool:
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

        return issubclass(cls, CPUUnquantizedExperts) or original.__func__()

    return classmethod(_supports_batch_invariance)


def _routing(original):
    """_softmax_topk of the CPU router: call the bundled kernel in compiled and in eager code."""
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
        how="vLLM may choose the unquantized CPU experts, which the patch point moe.cpu_experts certifies",
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
        why="the tokens of an expert decide the tiles of the grouped GEMM, so its order could change with the batch",
        how="vLLM's kernel stays, and bi_patch certifies its row order for the model's experts",
        until="upstream states one order for its CPU experts",
        causes=(10, 13),
        serves=("FusedMoE", "MoERunner", "RoutedExperts", "FusedMoEExperts"),
    ),
    Seam(
        name="moe.cpu_routing",
        targets=(Target("vllm.model_executor.layers.fused_moe.router.cpu_router", "_softmax_topk"),),
        close=_routing,
        why="compiled code computes another exponential than eager code, and nothing states which of two tied experts "
        "wins",
        how="one bundled kernel sums in one order and takes the lower of two tied experts",
        until="upstream states the order of the sum and of ties",
        causes=(13, 17),
    ),
)
