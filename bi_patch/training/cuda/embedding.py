"""The embedding on CUDA: copies of rows, with a backward that adds in fp32, tokens ascending, without atomics."""

from __future__ import annotations

import torch

from bi_patch.kernels.triton import embedding_backward as kernel


def embedding(ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, padding: int) -> torch.Tensor:
    """weight[ids] in `dtype`. ids: [rows] int64. weight: [vocabulary, C]. Returns [rows, C]. padding: for autograd."""
    return weight[ids].to(dtype)


def embedding_backward(grad: torch.Tensor, ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The sum of grad [rows, C] over the rows of each token in ids [rows]. Returns [vocabulary, C] fp32."""
    return kernel.embedding(grad, ids, vocabulary)
