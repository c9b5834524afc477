"""What a layer's sequences add to its fp32 chain on CUDA: one launch for all sequences, which keeps their order.

A bundled kernel serves a size if it passed a trial in this process: one launch for several sequences must give the bits
of a launch for each, and the numbers of the way that adds sequence by sequence, up to rounding. If not, that serves.
Both give the same gradients for every cut into micro-batches; their bits differ from each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from bi_patch.kernels.triton import chains as kernel
from bi_patch.kernels.triton import embedding_backward
from bi_patch.ops import bits
from bi_patch.ops.cuda import outer
from bi_patch.training import apart
from bi_patch.training.apart import Spans

# Lengths in rows: below, at and above the rows that a kernel takes at once. One sequence is empty.
_TRIED = (1, 5, 0, 64, 65, 31, 300)
_CLOSE = 1e-4  # of the norm of what was added
_EPS = 1e-6
_MOST = 1 << 24  # elements of a chain in a trial: a larger one stands for itself by fewer rows

TRIALS: dict[str, bool] = {}  # each trial of this process, and whether the kernel passed


def product(grad: torch.Tensor, x: torch.Tensor, spans: Spans, chain: torch.Tensor) -> None:
    """As bi_patch.training.cpu.chains, which states the shapes. fp32 rows take cuBLASLt, sequence by sequence."""
    if x.dtype != torch.float32 and _serves("product", tuple(chain.shape), x.dtype, x.device):
        kernel.products(grad, x, spans, chain)
    else:
        _products_apart(grad, x, spans, chain)


def column_sum(grad: torch.Tensor, spans: Spans, chain: torch.Tensor) -> None:
    """As bi_patch.training.cpu.chains, which states the shapes."""
    served = _serves("sum", tuple(chain.shape), grad.dtype, grad.device)
    (kernel.sums if served else apart.column_sum)(grad, spans, chain)


def norm(grad: torch.Tensor, x: torch.Tensor, eps: float, spans: Spans, chain: torch.Tensor) -> None:
    """As bi_patch.training.cpu.chains, which states the shapes."""
    served = _serves("norm", tuple(chain.shape), x.dtype, x.device)
    (kernel.norms if served else apart.norm)(grad, x, eps, spans, chain)


def embedding(grad: torch.Tensor, ids: torch.Tensor, spans: Spans, chain: torch.Tensor) -> None:
    """As bi_patch.training.cpu.chains, which states the shapes."""
    served = _serves("embedding", tuple(chain.shape), grad.dtype, grad.device)
    (_rows if served else _rows_apart)(grad, ids, spans, chain)


def _products_apart(grad: torch.Tensor, x: torch.Tensor, spans: Spans, chain: torch.Tensor) -> None:
    for first, last in spans:
        outer.product(apart.copied(grad[first:last]), apart.copied(x[first:last]), chain, add=True)


def _rows(grad: torch.Tensor, ids: torch.Tensor, spans: Spans, chain: torch.Tensor) -> None:
    if sum(last - first for first, last in spans) != len(ids):  # padding lies between
        grad, ids = (torch.cat([x[:0], *(x[first:last] for first, last in spans)]) for x in (grad, ids))
    embedding_backward.add(grad, ids, chain)


def _rows_apart(grad: torch.Tensor, ids: torch.Tensor, spans: Spans, chain: torch.Tensor) -> None:
    for first, last in spans:  # index_add_ would add in any order
        chain.index_put_((ids[first:last],), apart.copied(grad[first:last]), accumulate=True)


def _serves(what: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel passes its trial for chains of this shape. what: a name of `_trials`. dtype: of the rows."""
    if len(shape) == 2 and shape[0] * shape[1] > _MOST:
        shape = (_MOST // shape[1] // 128 * 128 + shape[0] % 128, shape[1])
    return _passes(what, shape, dtype, device)


@functools.cache
def _passes(what: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    generator = torch.Generator(device).manual_seed(shape[0])
    edges = torch.tensor((0, *_TRIED)).cumsum(0).tolist()
    spans = tuple(zip(edges, edges[1:]))
    start = torch.randn(shape, generator=generator, device=device)
    together, one_by_one, want = start.clone(), start.clone(), start.clone()
    given, run, plain = _trials(what, shape, dtype, device, generator)
    run(*given, spans, together)
    plain(*given, spans, want)
    for first, last in spans:
        run(*(x[first:last].clone() for x in given), ((0, last - first),), one_by_one)
    added, wrong = want - start, together - want
    passed = not bits.differing(together, one_by_one) and bool(wrong.norm() <= _CLOSE * added.norm())
    TRIALS[f"{what} {shape} {dtype}"] = passed
    return passed


def _trials(what, shape, dtype, device, generator) -> tuple[tuple[torch.Tensor, ...], Callable, Callable]:
    """Random rows, the kernel, and the way that adds sequence by sequence: each takes (*rows, spans, chain)."""
    rows = sum(_TRIED)

    def random(columns):
        return torch.randn(rows, columns, generator=generator, device=device).to(dtype)

    if what == "product":
        return (random(shape[0]), random(shape[1])), kernel.products, _products_apart
    if what == "sum":
        return (random(shape[0]),), kernel.sums, apart.column_sum
    if what == "embedding":
        ids = torch.randint(0, shape[0], (rows,), generator=generator, device=device)
        return (random(shape[1]), ids), _rows, _rows_apart
    return (
        (random(shape[0]), random(shape[0])),
        lambda g, x, spans, chain: kernel.norms(g, x, _EPS, spans, chain),
        lambda g, x, spans, chain: apart.norm(g, x, _EPS, spans, chain),
    )
