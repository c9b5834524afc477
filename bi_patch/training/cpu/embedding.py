"""The embedding on CPU: copies of rows, with a backward that adds in fp32, tokens ascending."""

from __future__ import annotations

import torch


def embedding_backward(grad: torch.Tensor, ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The sum of grad [rows, C] over the rows of each token in ids [rows]. Returns [vocabulary, C] fp32."""
    total = torch.zeros(vocabulary, grad.shape[1], dtype=torch.float32)
    return total.index_add_(0, ids, grad.float())


def embedding(ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, padding: int) -> torch.Tensor:
    """weight[ids] in `dtype`. ids: [rows] int64. weight: [vocabulary, C]. Returns [rows, C]. padding: for autograd."""
    return weight[ids].to(dtype)
