"""RMSNorm on Ascend by the bundled kernel, with and without a residual."""

from __future__ import annotations

from bi_patch.ops.ascend import machine


def rms_norm(x, weight, eps: float, residual=None, offset: float = 0.0):
    """RMSNorm of x [..., C] (floats) times (weight [C] + offset) -> [..., C].

    With a residual [..., C], the function norms x + residual and returns (the norm, x + residual).
    """
    from bi_patch.kernels.ascend import rows

    out, summed = rows.rms_norm(x, weight, eps, machine.chip(), residual, offset)
    return out if residual is None else (out, summed)


def npu_rms_norm(input, gamma, epsilon=1e-6):
    """(RMSNorm of input [..., C] (floats) times gamma [C], an empty fp32 tensor in place of the reciprocal root)."""
    import torch

    return rms_norm(input, gamma, epsilon), torch.empty(0, dtype=torch.float32, device=input.device)


def npu_gemma_rms_norm(input, gamma, epsilon=1e-6):
    """(RMSNorm of input [..., C] (floats) times (gamma [C] + 1), an empty fp32 tensor)."""
    import torch

    out = rms_norm(input, gamma, epsilon, None, 1.0)
    return out, torch.empty(0, dtype=torch.float32, device=input.device)


def npu_add_rms_norm(x1, x2, gamma, epsilon=1e-6):
    """(RMSNorm of x1 + x2 [..., C] (floats) times gamma [C], an empty fp32 tensor, x1 + x2 [..., C])."""
    import torch

    out, summed = rms_norm(x1, gamma, epsilon, x2)
    return out, torch.empty(0, dtype=torch.float32, device=x1.device), summed
