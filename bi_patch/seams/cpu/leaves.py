"""Row-parallel layers on CPU in fixed parts of K, for BI_PATCH_TP_INVARIANT."""

from typing import Any

from bi_patch.seams import active, leaves


def serve(layer: Any, remove_weight: bool) -> None:
    """Give a row-parallel layer with loaded weights its function: the whole sum over K, so vLLM adds nothing after it.

    Raises UnsupportedFeature for a layer that the parts do not fit.
    """
    import torch

    from bi_patch.ops.cpu import leaves as ops

    leaves.check(layer)
    weight = layer.weight.detach()
    bias = None if layer.skip_bias_add or layer.bias is None else layer.bias.detach().clone()
    layer.cpu_linear = ops.route(weight, bias, active.leaves, layer.tp_size, _gather, layer, active.cache)
    layer.reduce_results = False
    setattr(layer, leaves.SERVED, True)
    if remove_weight:
        layer.weight = torch.nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)


def _gather(out: Any, own: Any) -> None:
    from vllm.distributed.parallel_state import get_tp_group

    held = get_tp_group().device_communicator
    held.dist_module.all_gather_into_tensor(out.view(-1), own.view(-1), group=held.device_group)
