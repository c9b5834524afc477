"""Weight gradients on CUDA: grad [M, N].T @ x [M, K], by cuBLASLt, with an algorithm that the sizes alone decide.

A second run with the same sizes has the same bits, and so has a sequence in another batch. Another M may have another
order, so there is no certificate. Each sum over M has one fp32 accumulator: no algorithm splits M.
"""

from __future__ import annotations

import functools

import torch

from bi_patch.ops.cuda import cublaslt

# A sequence's length is an M, so a trainer meets ever more sizes. A product that is made again has the same algorithm.
_product = functools.lru_cache(maxsize=1024)(cublaslt.WeightGradient)


def product(grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor, add: bool = False) -> torch.Tensor:
    """Write grad [M, N].T @ x [M, K] into out [N, K], or add it if `add`. Returns out.

    grad and x have one dtype, bf16, fp16 or fp32; out, contiguous, has the same dtype or fp32. An fp32 out is added in
    fp32, before the one rounding. Raises CertificateFailed if the library has no algorithm for the sizes.
    """
    grad, x = _packed(grad), _packed(x)
    rows, n = grad.shape
    if not rows:
        return out if add else out.zero_()
    made = _product(rows, n, x.shape[1], x.dtype, out.dtype)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    made(grad.data_ptr(), x.data_ptr(), out.data_ptr(), float(add), stream)
    return out


def _packed(x: torch.Tensor) -> torch.Tensor:
    """x with packed rows, aligned as the library was told."""
    aligned = x.is_contiguous() and x.data_ptr() % cublaslt.ALIGNMENT == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)
