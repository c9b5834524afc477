"""Equal bits for every tensor-parallel size (BI_PATCH_TP_INVARIANT): what CPU and CUDA check of a model's layers."""

from typing import Any

from bi_patch.errors import UnsupportedFeature
from bi_patch.seams import active

SERVED = "bi_patch_leaves"  # attribute of a layer whose function gives the whole sum over K


def is_row_parallel(layer: Any) -> bool:
    from vllm.model_executor.layers.linear import RowParallelLinear

    return isinstance(layer, RowParallelLinear)


def check(layer: Any) -> None:
    """Raise UnsupportedFeature for a row-parallel layer that the parts do not fit."""
    fits = not active.leaves % layer.tp_size and not layer.input_size % active.leaves
    if fits and (layer.reduce_results or getattr(layer, SERVED, False)):
        return
    why = (
        "whose ranks' parts the model adds by itself"
        if fits
        else f"with K = {layer.input_size} on {layer.tp_size} ranks cannot be cut into {active.leaves} equal parts"
    )
    refuse(f"a row-parallel layer ({getattr(layer, 'prefix', '') or type(layer).__name__}) {why}")


def refuse(what: str) -> None:
    raise UnsupportedFeature(
        f"communicator.leaves: with BI_PATCH_TP_INVARIANT={active.leaves}, {what}. Use fewer parts, or leave "
        "BI_PATCH_TP_INVARIANT out"
    )


def check_served(model: Any) -> None:
    """Raise UnsupportedFeature for a row-parallel layer of a loaded model that did not take its fixed parts."""
    left = [name for name, layer in model.named_modules() if is_row_parallel(layer) and not hasattr(layer, SERVED)]
    if left:
        refuse(f"{len(left)} row-parallel layers have another function than bi_patch's ({', '.join(left[:3])})")


def one_zero(model: Any) -> None:
    """Make every -0 of an embedding a 0: a sum over ranks would do so, and one rank alone adds nothing."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for layer in model.modules():
        if isinstance(layer, VocabParallelEmbedding) and layer.weight.is_floating_point():
            layer.weight.data.add_(0.0)


def no_update(model: Any) -> None:
    raise UnsupportedFeature(
        f"communicator.leaves: nobody has examined new weights with BI_PATCH_TP_INVARIANT={active.leaves} "
        f"({type(model).__name__}). Start another engine with them, or leave BI_PATCH_TP_INVARIANT out"
    )
