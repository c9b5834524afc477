"""What a layer's sequences add to its fp32 chain on CUDA: one launch for all sequences, which keeps their order."""

from __future__ import annotations

import torch

from bi_patch.kernels.triton import chains as kernel
from bi_patch.kernels.triton import embedding_backward
from bi_patch.ops.cuda import outer

Spans = tuple[tuple[int, int], ...]  # of each sequence: its first row, and the row after its last


def product(grad: torch.Tensor, x: torch.Tensor, spans: Spans, chain: torch.Tensor) -> None:
    """As bi_patch.training.cpu.chains, which states the shapes. fp32 rows take cuBLASLt, sequence by sequence."""
    if not spans:
        return
    if x.dtype == torch.float32:
        for first, last in spans:
            outer.product(grad[first:last].clone(), x[first:last].clone(), chain, add=True)
    else:
        kernel.products(grad, x, spans, chain)


def column_sum(grad: torch.Tensor, spans: Spans, chain: torch.Tensor) -> None:
    """As bi_patch.training.cpu.chains, which states the shapes."""
    if spans:
        kernel.sums(grad, spans, chain)


def norm(grad: torch.Tensor, x: torch.Tensor, eps: float, spans: Spans, chain: torch.Tensor) -> None:
    """As bi_patch.training.cpu.chains, which states the shapes."""
    kernel.norms(grad, x, eps, spans, chain)


def embedding(grad: torch.Tensor, ids: torch.Tensor, spans: Spans, chain: torch.Tensor) -> None:
    """As bi_patch.training.cpu.chains, which states the shapes."""
    if spans and sum(last - first for first, last in spans) != len(ids):  # padding lies between
        grad, ids = (torch.cat([x[first:last] for first, last in spans]) for x in (grad, ids))
    if spans:
        embedding_backward.add(grad, ids, chain)
