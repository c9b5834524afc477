"""Linear layers on CUDA by the sampler's routes: cuBLASLt where certified, else the bundled GEMM.

A problem (N, K) is certified when the trainer first meets it with more rows than its certificate covers: for the first
of _LIMITS that holds the rows. A sampler's certificate of this process serves, too. The backward multiplies by the
transposed weight, a problem of its own. A route changes the speed and never the bits.
"""

from __future__ import annotations

from pathlib import Path

import torch

from bi_patch.kernels.triton import reduce
from bi_patch.ops.cuda import linear as routes
from bi_patch.ops.cuda import outer
from bi_patch.training.ranks import by_rank

# Rows that a certificate covers. A certificate for many rows takes seconds, and small batches need none.
_LIMITS = (1024, 32768)
_MOST = _LIMITS[-1]  # rows: more take the bundled GEMM
_cache: list[Path] = []
_known: dict[routes.Problem, int] = {}  # the rows for which a problem was certified


def certificates_in(folder: Path) -> None:
    """Keep certificates in `folder`. Without this call, the bundled GEMM serves."""
    _cache[:] = [folder]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, parts: int) -> torch.Tensor:
    """x @ weight.T + bias. x: [rows, K]. weight: [N, K]. bias: [N] or None. Returns [rows, N] in x's dtype.

    parts: 1, or how many ranks of a tensor-parallel sampler share K (bi_patch.training.ranks).
    """
    return by_rank(product, x, weight, bias, parts)


def linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, of_x: bool, of_weight: bool, of_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x [rows, K], of weight [N, K] and of bias [N] (weight's dtype), from grad [rows, N]."""
    none = grad.new_empty(0)
    grad = grad.contiguous()
    of_rows = product(grad, weight.to(x.dtype).t().contiguous(), None) if of_x else none
    of_weights = (
        outer.product(grad, x, torch.empty(weight.shape, dtype=weight.dtype, device=x.device)) if of_weight else none
    )
    return of_rows, of_weights, _column_sum(grad).to(weight.dtype) if of_bias else none


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, most: int = _MOST) -> torch.Tensor:
    """x [rows, K] @ weight [N, K].T + bias [N] -> [rows, N], all of one dtype, by the problem's route.

    most: the number of rows up to which a problem is certified.
    """
    if not len(x):
        return x.new_empty(0, len(weight))
    problem = routes.Problem(*weight.shape, x.dtype, bias is not None)
    if _cache and min(len(x), most) > _known.get(problem, 0):
        _certify(problem, len(x), most)
    return routes.linear(x, weight, bias)


def _certify(problem: routes.Problem, rows: int, most: int) -> None:
    """Certify a problem for at least min(rows, most) rows."""
    held = routes.routes().get(problem)
    if held is not None and min(rows, most) <= held.limit:  # the sampler's
        _known[problem] = held.limit
        return
    _known[problem] = next((limit for limit in _LIMITS if rows <= limit <= most), most)
    routes.certify([problem], _known[problem], _cache[0])


def _column_sum(grad: torch.Tensor) -> torch.Tensor:
    return reduce.row_sum(grad.t().contiguous(), torch.float32)
