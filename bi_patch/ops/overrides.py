"""Replaces PyTorch's operators on a dispatch key, for every caller: all forms of an operator by one function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch

# By operator without overload: which arguments are covered, and the function that computes the result.
Overrides = Mapping[str, tuple[Callable[..., bool], Callable]]


def register(overrides: Overrides, key: str) -> torch.library.Library:
    """Register the overrides on a dispatch key, over PyTorch's kernels and over upstream's mode.

    PyTorch's kernel serves arguments that an override does not cover. Names end with `out` or `_` for these forms; the
    functions compute the plain form. The overrides last as long as the returned library.
    """
    library = torch.library.Library("aten", "IMPL")
    # PyTorch says once in each process that an operator is overridden, which is meant here.
    warnings.filterwarnings("ignore", "Warning only once for all operators")
    for name, (covers, compute) in overrides.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
            continue  # the installed PyTorch lacks this form
        kept = torch.library.get_kernel(f"aten::{name}", key)
        if name.endswith("out"):
            compute = _into(compute)
        elif name.endswith("_"):
            compute = _in_place(compute)
        library.impl(f"aten::{name}", _either(covers, compute, kept), key, with_keyset=True, allow_override=True)
    return library


def _either(covers: Callable[..., bool], compute: Callable, kept) -> Callable:
    """An implementation that calls `compute` for arguments that `covers` accepts, and PyTorch's kernel for others."""

    def implementation(keys, *args, **kwargs):
        if covers(*args, **kwargs):
            return compute(*args, **kwargs)
        return kept.call_boxed(keys, *args, **kwargs)

    return implementation


def _into(compute: Callable) -> Callable:
    """The `.out` form of `compute`."""

    def into(*args, out, **kwargs):
        result = compute(*args, **kwargs)
        if out.shape != result.shape:
            out.resize_(result.shape)
        return out.copy_(result)

    return into


def _in_place(compute: Callable) -> Callable:
    """The in-place form of `compute`."""
    return lambda held, *args, **kwargs: held.copy_(compute(held, *args, **kwargs))
