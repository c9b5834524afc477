"""The choice of experts and the experts on CUDA: vLLM's router and its Triton experts, with a backward.

The sampler certified that its tiles give the bits of one fixed tile. Here the fixed tile serves, or a larger one that
gave its bits for the same kind of experts in this process.

Backward: the rows of each expert are multiplied apart, experts ascending. A row's gradient does not depend on other
rows: each of its experts adds its part in fp32, in the order of the experts' ids. A weight's gradient is one product
for each expert, whose order the number of the expert's rows decides.
"""

from __future__ import annotations

import functools

import torch

from bi_patch.kernels.triton import gated_backward, reduce
from bi_patch.ops import bits
from bi_patch.ops.cuda import moe, outer
from bi_patch.training.chosen import chosen_rows
from bi_patch.training.chunks import chunked
from bi_patch.training.cuda import linear, vllm_kernels

_CHUNK = 8192  # rows: memory holds top_k rows of both products for each
_LARGE = {
    "BLOCK_SIZE_M": 128,
    "BLOCK_SIZE_N": 128,
    "BLOCK_SIZE_K": 64,
    "GROUP_SIZE_M": 8,
    "SPLIT_K": 1,
    "num_warps": 8,
    "num_stages": 3,
}
_TRIED = (1, 129, 2048)  # rows


def route(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As bi_patch.training.cpu.experts, which states the shapes, by vLLM's kernel."""
    return vllm_kernels.route(logits.contiguous(), top_k, renormalize)


def route_backward(
    grad: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, renormalize: bool
) -> torch.Tensor:
    """The gradient of logits [rows, experts], from grad [rows, top_k] fp32 and what the forward returned."""
    chosen, weighted = ids.long(), grad * weights
    total = weighted[:, :1]
    for place in range(1, weights.shape[1]):  # PyTorch's sum may take another order for other numbers of rows
        total = total + weighted[:, place : place + 1]
    if renormalize:
        found = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
        found.scatter_(-1, chosen, weighted - weights * total)
    else:
        found = (logits.softmax(-1, dtype=torch.float32) * -total).scatter_add_(-1, chosen, weighted)
    return found.to(logits.dtype)


def experts(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, kind: str
) -> torch.Tensor:
    """As bi_patch.training.cpu.experts, which states the shapes."""
    first, second = (weight.to(x.dtype).contiguous() for weight in (gate_up, down))
    tile = _tile(_problem(x, ids, down, kind), x.device)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for at, rows, share, chosen in chunked(_CHUNK, x.contiguous(), weights.contiguous(), ids.contiguous()):
        out[at] = vllm_kernels.experts(rows, share, chosen, first, second, kind, tile)
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
    """As bi_patch.training.cpu.experts, which states the shapes."""
    none = x.new_empty(0)
    of_x = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    of_weights = torch.zeros_like(weights)
    both = [torch.zeros_like(w, memory_format=torch.contiguous_format) if of_experts else none for w in (gate_up, down)]
    for expert, rows, place in chosen_rows(ids, len(gate_up)):
        first = gate_up[expert].to(x.dtype)
        held, share = x[rows], weights[rows, place]
        of_both, inner, of_share = _of_expert(held, grad[rows], share, first, down[expert].to(x.dtype), kind)
        if of_rows:
            of_weights[rows, place] = of_share
            # No row comes twice, so the order of the additions is that of the experts.
            of_x.index_add_(0, rows, linear.product(of_both, first.t().contiguous(), None).float())
        if of_experts:
            outer.product(of_both, held, both[0][expert])
            outer.product(_scaled(grad[rows], share), inner, both[1][expert])
    return (of_x.to(x.dtype), of_weights, *both) if of_rows else (none, none, *both)


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
    """As bi_patch.training.cpu.experts, which states the shapes."""
    for expert, rows, place in chosen_rows(ids, len(gate_up)):
        held, share, both = x[rows], weights[rows, place], (w[expert].to(x.dtype) for w in (gate_up, down))
        of_both, inner, _ = _of_expert(held, grad[rows], share, *both, kind)
        if into_gate_up is not None:
            outer.product(of_both, held, into_gate_up[expert], add=True)
        if into_down is not None:
            outer.product(_scaled(grad[rows], share), inner, into_down[expert], add=True)


def _of_expert(x, grad, share, first, second, kind):
    """The gradients of one expert's first product and of its shares, and its activations, from grad [rows, C]."""
    both = linear.product(x, first.contiguous(), None)
    inner = vllm_kernels.gated(both, kind)
    plain = linear.product(grad, second.t().contiguous(), None)  # the gradient of inner, before the share
    of_share = reduce.row_sum(plain.float() * inner.float(), torch.float32)
    return torch.cat(gated_backward.gated(_scaled(plain, share), *both.chunk(2, -1), kind), -1), inner, of_share


def _scaled(x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return (x.float() * share[:, None]).to(x.dtype)


def _problem(x: torch.Tensor, ids: torch.Tensor, down: torch.Tensor, kind: str) -> moe.Problem:
    return moe.Problem(down.shape[0], down.shape[2], x.shape[1], ids.shape[1], x.dtype, kind)


@functools.cache
def _tile(problem: moe.Problem, device: torch.device) -> dict[str, int]:
    """The large tile if it gives the bits of the fixed one for these experts, else the fixed one."""
    if problem.dtype.itemsize == 4:
        return moe.FIXED  # the large tile does not fit
    generator = torch.Generator(device).manual_seed(problem.n)
    x, first, second = moe.operands(problem, max(_TRIED), generator)
    scores = torch.rand(max(_TRIED), problem.experts, generator=generator, device=device)
    weights, ids = scores.softmax(-1).topk(problem.top_k, dim=-1)
    for rows in _TRIED:
        given = x[:rows], weights[:rows], ids[:rows].int(), first, second, problem.activation
        pair = [vllm_kernels.experts(*given, tile) for tile in (moe.FIXED, _LARGE)]
        if bits.differing(*pair):
            return moe.FIXED
    return _LARGE
