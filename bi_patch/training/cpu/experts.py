"""The choice of experts and the experts on CPU: the bundled kernel and vLLM's, with their backward in fp32.

vLLM's kernel must be loaded: a trainer whose model has experts imports vllm in its process. The sampler certified the
kernel's row order.
"""

from __future__ import annotations

import torch

from bi_patch.errors import MissingDependency, UnsupportedDevice, UnsupportedFeature
from bi_patch.ops.cpu import machine
from bi_patch.training.chosen import chosen_rows
from bi_patch.training.cpu.gated import _DERIVED
from bi_patch.training.cpu.linear import _product

_ALIGNED = 32  # vLLM pads other sizes


def route(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k experts of each row of logits [rows, experts] by softmax: weights fp32 and ids int32 [rows, top_k].

    The highest comes first, and the lower id wins a tie. renormalize: divide each row's weights by their sum.
    """
    return torch.ops.bi_cpu.softmax_topk(logits, top_k, renormalize)


def route_backward(
    grad: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, renormalize: bool
) -> torch.Tensor:
    """The gradient of logits [rows, experts], from grad [rows, top_k] fp32 and what the forward returned."""
    chosen, weighted = ids.long(), grad * weights
    total = weighted.sum(-1, keepdim=True)
    if renormalize:
        found = torch.zeros(logits.shape, dtype=torch.float32).scatter_(-1, chosen, weighted - weights * total)
    else:
        found = (logits.softmax(-1, dtype=torch.float32) * -total).scatter_add_(-1, chosen, weighted)
    return found.to(logits.dtype)


def experts(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, kind: str
) -> torch.Tensor:
    """The weighted sum of each row's experts.

    x: [rows, C]. weights: [rows, k] fp32. ids: [rows, k] int32. gate_up: [experts, 2 D, C]. down: [experts, C, D].
    kind: as for gated. Returns [rows, C] in x's dtype. Raises MissingDependency without vLLM's kernel, and
    UnsupportedDevice where Linux refuses the AMX tiles that the sampler's kernel takes.
    """
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        raise MissingDependency("training.experts: vLLM's CPU kernel of experts is not loaded. Import vllm first")
    if x.shape[1] % _ALIGNED or down.shape[2] % _ALIGNED:
        raise UnsupportedFeature(
            f"training.experts: experts of {x.shape[1]} and {down.shape[2]} elements have no kernel on CPU, which "
            f"takes multiples of {_ALIGNED}. Use another model"
        )
    tiles = torch.cpu._is_amx_tile_supported() and x.dtype == torch.bfloat16
    if tiles and not machine.allow_tiles():
        raise UnsupportedDevice("training.experts: Linux does not let this process use AMX tiles. Train in fp32")
    isa = "amx" if tiles else "vec"
    held = [weight.to(x.dtype) for weight in (gate_up, down)]
    packed = [torch.empty_like(weight) for weight in held]
    for weight, into in zip(held, packed):
        torch.ops._C.prepack_moe_weight(weight, into, isa)
    out = torch.empty_like(x)
    torch.ops._C.cpu_fused_moe(out, x, *packed, None, None, weights.contiguous(), ids.contiguous(), False, kind, isa)
    return out


def experts_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    kind: str,
    of_rows: bool,
    of_experts: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x [rows, C], weights [rows, k] fp32, gate_up and down (their dtypes), from grad [rows, C].

    of_rows: whether the first two are asked for. of_experts: the last two.
    """
    none = x.new_empty(0)
    of_x, of_weights = torch.zeros(x.shape, dtype=torch.float32), torch.zeros_like(weights)
    of_gate_up, of_down = (torch.zeros_like(weight) if of_experts else none for weight in (gate_up, down))
    for expert, rows, place in chosen_rows(ids, len(gate_up)):
        share = weights[rows, place, None]
        first, second = (weight[expert].to(x.dtype) for weight in (gate_up, down))
        of_both, inner, of_share = _of_expert(x[rows], grad[rows], share, first, second, kind)
        if of_rows:
            of_weights[rows, place] = of_share
            of_x.index_add_(0, rows, _product(of_both.to(x.dtype), first.t().contiguous(), None).float())
        if of_experts:
            of_gate_up[expert] = (of_both.t() @ x[rows].float()).to(gate_up.dtype)
            of_down[expert] = ((grad[rows].float() * share).t() @ inner).to(down.dtype)
    return (of_x.to(x.dtype), of_weights, of_gate_up, of_down) if of_rows else (none, none, of_gate_up, of_down)


def add_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    kind: str,
    into_gate_up: torch.Tensor | None,
    into_down: torch.Tensor | None,
) -> None:
    """Add the experts' gradients to into_gate_up and into_down, fp32, of the weights' shapes. None: not asked for.

    The other arguments are those of experts_backward. The rows of a call decide the order of its sums.
    """
    for expert, rows, place in chosen_rows(ids, len(gate_up)):
        share = weights[rows, place, None]
        both = (weight[expert].to(x.dtype) for weight in (gate_up, down))
        of_both, inner, _ = _of_expert(x[rows], grad[rows], share, *both, kind)
        if into_gate_up is not None:
            into_gate_up[expert].addmm_(of_both.t(), x[rows].float())
        if into_down is not None:
            into_down[expert].addmm_((grad[rows].float() * share).t(), inner)


def _of_expert(x, grad, share, first, second, kind):
    """The gradient of one expert's first product, its activations, and the gradient of its share: fp32.

    x, grad: [rows, C]. share: [rows, 1]. first, second: the expert's weights, of x's dtype. The products are the
    bundled GEMM's, so that a row does not depend on the others.
    """
    gate, up = _product(x, first, None).float().chunk(2, -1)
    value, slope = _DERIVED[kind](gate)
    inner = value * up
    plain = _product(grad, second.t().contiguous(), None).float()  # the gradient of inner, before the share
    of_inner = plain * share
    return torch.cat((of_inner * up * slope, of_inner * value), -1), inner, (plain * inner).sum(-1)
