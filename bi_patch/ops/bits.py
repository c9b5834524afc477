"""The one comparison of bits: every certificate, test and benchmark counts with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def differing(got: torch.Tensor, want: torch.Tensor) -> int:
    """How many elements of two tensors differ in any bit. Equal tensors cost one pass.

    got, want: one shape and one dtype, of 1, 2, 4 or 8 bytes an element, on one device; their strides may differ.
    NaN equals NaN where the bits are equal; 0.0 differs from -0.0. Raises ValueError for another shape or dtype.
    """
    import torch

    if got.shape != want.shape or got.dtype != want.dtype:
        raise ValueError(f"cannot compare {got.dtype} {tuple(got.shape)} with {want.dtype} {tuple(want.shape)}")
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(got.element_size())
    if integer is None:
        raise ValueError(f"cannot compare the bits of {got.dtype}")
    a, b = got.view(integer), want.view(integer)
    return 0 if torch.equal(a, b) else int((a != b).sum())
