"""Mixture-of-experts layers: certificates for the experts, and a bundled router."""

import functools
import weakref

from bi_patch.seams.model import Seam, Target
from bi_patch.seams.naming import dotted


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


def _keep(original):
    """CPURouter.__init__: keep the router, and certify every choice of experts but the plain softmax."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        from bi_patch.ops.cpu import moe, rows

        original(self, *args, **kwargs)
        self.bi_patch_handle = None
        if not _is_plain(self):
            compute = _original_routing(type(self))

            mine = weakref.ref(self)  # the certificate's check must not keep the layer alive

            def router(hidden, logits, input_ids):
                return compute(mine(), hidden, logits, None, input_ids=input_ids)

            self.bi_patch_handle = moe.keep(router, self)
            rows.register_router(router, _kind(self), self.global_num_experts, self.top_k)

    return __init__


def _route(original):
    """CPURouter._compute_routing: one operator for every choice of experts but the plain softmax."""
    from bi_patch.ops.cpu import moe

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        if self.bi_patch_handle is None:
            return original(self, hidden_states, router_logits, indices_type, input_ids=input_ids)
        return moe.route(hidden_states, router_logits, input_ids, self.bi_patch_handle, self.top_k)

    _compute_routing.__wrapped__ = original
    return _compute_routing


def _original_routing(router):
    """vLLM's own _compute_routing, which the patch point moe.cpu_router wraps."""
    held = router._compute_routing
    return getattr(held, "__wrapped__", held)


def _is_plain(router) -> bool:
    """Whether a router is a softmax without groups, which the patch point moe.cpu_routing serves."""
    return not router.use_grouped_topk and router.custom_routing_function is None and router.scoring_func == "softmax"


def _kind(router) -> str:
    """What decides a router's operations, in words for its certificate."""
    if router.use_grouped_topk:
        groups = f"{router.topk_group} of {router.num_expert_group} groups"
        bias = " bias" if router.e_score_correction_bias is not None else ""
        return f"{router.scoring_func}{bias}, {groups}{', renormalized' if router.renormalize else ''}"
    custom = router.custom_routing_function
    named = router.scoring_func if custom is None else dotted(custom)
    return f"{named}{', renormalized' if router.renormalize else ''}"


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
    Seam(
        name="moe.cpu_router_init",
        targets=(Target("vllm.model_executor.layers.fused_moe.router.cpu_router", "CPURouter.__init__"),),
        close=_keep,
        why="routers with groups, sigmoid or a function of the model use PyTorch's operators, and the numbers of rows "
        "and threads decide which elements PyTorch computes by scalar code",
        how="bi_patch certifies the row order of the layer's router",
        until="upstream states one order for its CPU routers",
        causes=(13, 26),
    ),
    Seam(
        name="moe.cpu_router",
        targets=(Target("vllm.model_executor.layers.fused_moe.router.cpu_router", "CPURouter._compute_routing"),),
        close=_route,
        why="compiled code computes another sigmoid than eager code, and cuts rows in another place",
        how="compiled code calls the certified router as one operator",
        until="upstream states one order for its CPU routers",
        causes=(13, 17, 26),
        serves=("CPURouter",),
        op="bi_patch.ops.cpu.moe",
    ),
)
