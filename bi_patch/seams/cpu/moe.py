"""Mixture-of-experts layers: certificates for the experts, and a bundled router."""

import functools

from bi_patch.errors import CertificateFailed, UnsupportedFeature
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


def _init(original):
    """CPURouter.__init__: every choice of experts but the plain softmax becomes an operator, named by its layer."""

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.bi_patch_layer = None if _is_plain(self) else ""

    return __init__


def certify_routers(model) -> None:
    """Name each router of a loaded model by its layer, and register it for a certificate, unless it is a plain softmax.

    Raises UnsupportedFeature for a router that reads token ids.
    """
    from bi_patch.ops.cpu import rows

    for layer in model.modules():
        router = getattr(layer, "router", None)
        if getattr(router, "bi_patch_layer", None) is None or not hasattr(layer, "layer_name"):
            continue
        if router._hash_indices_table is not None:
            raise UnsupportedFeature(
                f"moe.cpu_router: the layer {layer.layer_name} chooses experts by token ids, and bi_patch has no "
                "certificate for that. Use another model, or set BI_PATCH=0"
            )
        router.bi_patch_layer = layer.layer_name
        config = layer.moe_config
        choose = functools.partial(_choose, router)
        rows.register_router(
            choose, _kind(router), router.global_num_experts, router.top_k, config.hidden_dim, config.in_dtype
        )


def _choose(router, hidden, logits, input_ids):
    """The router's weights and ids, by vLLM's own code."""
    return _original_routing(type(router))(router, hidden, logits, None, input_ids=input_ids)


def _of_layer(name: str):
    """The choice of experts of a layer, in the engine whose step runs. Raises CertificateFailed without this layer."""
    from vllm.forward_context import get_forward_context

    router = getattr(get_forward_context().no_compile_layers.get(name), "router", None)
    if router is None:
        raise CertificateFailed(
            f"moe.cpu_router: compiled code asks for the router of {name}, which the model does not have. Delete "
            "vLLM's compile cache, and start the engine again"
        )
    return functools.partial(_choose, router)


def _route(original):
    """CPURouter._compute_routing: one operator for every choice of experts but the plain softmax."""
    from bi_patch.ops.cpu import moe

    moe.define_route(_of_layer)

    def _compute_routing(self, hidden_states, router_logits, indices_type, *, input_ids=None):
        if self.bi_patch_layer is None:
            return original(self, hidden_states, router_logits, indices_type, input_ids=input_ids)
        if not self.bi_patch_layer:
            raise UnsupportedFeature(
                "moe.cpu_router: a router outside of the layers of the model has no certificate. Use another model, or "
                "set BI_PATCH=0"
            )
        return moe.route(hidden_states, router_logits, input_ids, self.bi_patch_layer, self.top_k)

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
        close=_init,
        why="routers with groups, sigmoid or a function of the model use PyTorch's operators, and the numbers of rows "
        "and threads decide which elements PyTorch computes by scalar code",
        how="bi_patch marks the layer's router, and certifies its row order when the model is loaded",
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
