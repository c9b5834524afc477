"""Weight updates on CPU: layers compute with packed copies of their weights, which must follow every update.

vLLM frees a linear layer's own weight once it is packed, so the weight cannot be written in place. `model.load_weights`
therefore begins a layerwise load: a layer that gets all its weights is packed at once. Before the next step, layers
that got a part are completed with the weights that they have.

Experts keep their parameters, which hold packed weights of the same shape. A write in place would go through, and the
kernel would read it as packed. So a checksum tells whether anything but a load wrote packed experts.
"""

import functools
import weakref

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import active, leaves, pooling, vision, weights
from bi_patch.seams.model import Seam, Target

_LOADING = "_bi_patch_loading"  # attribute of a model: `begin` started a layerwise load

_EXPERTS = ("w13_weight", "w2_weight")  # what vLLM packs of a layer of experts
_packed: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # layer of experts -> the checksums of _EXPERTS


def watch(model, config) -> None:
    """Make every kind of load reach the packed copies of a loaded model. config: the engine's VllmConfig."""
    from bi_patch.ops.cpu import linear

    linear.take_routed()  # the first load's layers
    if active.leaves:
        weights.watch_model(model, leaves.no_update, leaves.no_update)
        return
    if pooling.is_pooling(config):
        weights.watch_model(model, pooling.no_update, pooling.no_update)
        return
    if vision.takes_images(config):
        weights.watch_model(model, vision.no_update, vision.no_update)
        return
    begin = functools.partial(_begin, config=config)
    settle = functools.partial(_settle, config=config)
    weights.watch_model(model, begin, settle, lambda model: weights.refuse_with_lora(config))


def _in_progress(model) -> bool:
    """Whether a layerwise load is under way, begun by vLLM or by `_begin`."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    return get_layerwise_info(model).can_load()


def _begin(model, config) -> None:
    weights.refuse_with_lora(config)
    from vllm.model_executor.model_loader.reload.layerwise import initialize_layerwise_reload

    if not _in_progress(model):
        setattr(model, _LOADING, True)
        initialize_layerwise_reload(model)


def _settle(model, config) -> None:
    """End a load that `_begin` started, and pack the weights of heads again, which vLLM does not do for a tied head."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload

    from bi_patch.ops.cpu import linear, rows
    from bi_patch.seams.cpu import mla, recurrent

    with set_current_vllm_config(config):
        if model.__dict__.get(_LOADING) and _in_progress(model):
            finalize_layerwise_reload(model, config.model_config)
        model.__dict__.pop(_LOADING, None)
        if _in_progress(model):  # vLLM ends its own load
            return
        routed = linear.take_routed()
        for layer in model.modules():
            if linear.has_route(layer) and layer.weight.numel() and layer not in routed:
                layer.quant_method.process_weights_after_loading(layer)
        linear.take_routed()
        mla.absorb_again(model)
    recurrent.check_again(model)
    _unwritten(model)
    rows.take_registered()  # the first load certified the same operations


def _checksums(layer) -> tuple[int, ...]:
    from bi_patch.ops import bits

    return tuple(bits.checksum(getattr(layer, name)) for name in _EXPERTS)


def _unwritten(model) -> None:
    """Raise UnsupportedFeature if packed experts changed without a load."""
    for name, layer in model.named_modules():
        if layer in _packed and _checksums(layer) != _packed[layer]:
            raise UnsupportedFeature(
                f"weights.cpu_experts: the experts of {name} were written in place. vLLM packs the weights of experts "
                "on CPU, so a write in place gives other weights than it means. Use reload_weights or "
                "model.load_weights"
            )


def _complete(original):
    """materialize_layer: a layer that gets a part of its weights keeps the others. vLLM leaves these uninitialized."""

    @functools.wraps(original)
    def materialize_layer(layer, info):
        from bi_patch.ops.cpu import quantized
        from bi_patch.seams.cpu.quantized import complete

        original(layer, info)
        if info.kernel_tensors is None or info.load_numel >= info.load_numel_total:
            return
        if quantized.has_route(layer):
            if complete(layer, info):
                return
            raise _a_part(layer)
        for name, held in (info.kernel_tensors[0] | info.kernel_tensors[1]).items():
            fresh = getattr(layer, name, None)
            if fresh is not None and fresh is not held:
                fresh.data.copy_(_unpacked(layer, name, held, fresh))

    return materialize_layer


def _unpacked(layer, name: str, held, fresh):
    """The weight that a layer computes with, in the shape of `fresh`."""
    from bi_patch.ops.cpu import linear

    if name == "weight" and not held.numel() and linear.has_route(layer):
        return linear.unpacked(layer)
    if getattr(getattr(layer, "quant_method", None), "moe_kernel", None) is not None or held.shape != fresh.shape:
        raise _a_part(layer)
    return held


def _a_part(layer) -> UnsupportedFeature:
    return UnsupportedFeature(
        f"weights.cpu_complete: a load gave a part of the weights of {type(layer).__name__}; the rest is packed. "
        "Give all weights of a layer between two requests, or use reload_weights"
    )


def _pack_experts(original):
    """UnquantizedFusedMoEMethod._setup_kernel: pack the experts' weights after an update, too, and note their sums."""

    @functools.wraps(original)
    def _setup_kernel(self, layer, *args, **kwargs):
        again = self.moe_kernel is not None
        original(self, layer, *args, **kwargs)
        if again:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)
        _packed[layer] = _checksums(layer)

    return _setup_kernel


_RELOAD = "vllm.model_executor.model_loader.reload"
_RUNNER = "vllm.v1.worker.gpu_model_runner"
_PACKED = "linear layers and heads compute with packed copies, which do not follow every kind of weight update"


def _step(name: str, method: str) -> Seam:
    return Seam(
        name=f"weights.{name}",
        targets=(Target(_RUNNER, f"GPUModelRunner.{method}"),),
        close=weights.before_step,
        why=_PACKED,
        how="before a step after an update, a load by model.load_weights is ended, and heads are packed again",
        until="upstream's layerwise load covers tied heads and model.load_weights on CPU",
        causes=(31,),
    )


SEAMS = (
    _step("cpu_step", "execute_model"),
    _step("cpu_dummy_step", "_dummy_run"),
    Seam(
        name="weights.cpu_complete",
        targets=(Target(f"{_RELOAD}.meta", "materialize_layer", "", (f"{_RELOAD}.layerwise",)),),
        close=_complete,
        why="a layer that gets a part of its weights computes with uninitialized memory for the others",
        how="the other weights stay. If they are packed by vLLM, the update is refused by name",
        until="upstream keeps weights that an update leaves out",
        causes=(31,),
    ),
    Seam(
        name="weights.cpu_experts",
        targets=(
            Target(
                "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method",
                "UnquantizedFusedMoEMethod._setup_kernel",
            ),
        ),
        close=_pack_experts,
        why="vLLM packs the experts' weights at the first load only, and then reads unpacked weights as packed ones",
        how="the experts' weights are packed after every load. Experts that were written in place are refused by name",
        until="upstream packs the experts of a CPU layer after an update",
        causes=(31,),
    ),
)
