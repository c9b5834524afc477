"""The trainer's side of on-policy reinforcement learning: logprobs with the sampler's bits, and their gradients.

from bi_patch import training

training.arm(model, sampler=llm)                # in place, on a transformers model
batch = training.batch(llm.generate(prompts, params), params)
new = training.logprobs(model, batch)           # with gradients
training.compare(new, batch, strict=True)       # counts bits
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bi_patch.training import contract, devices, huggingface
from bi_patch.training.compare import Parity, compare
from bi_patch.training.gradients import gradients
from bi_patch.training.huggingface import disarm
from bi_patch.training.logprobs import logprobs
from bi_patch.training.samples import Batch, batch
from bi_patch.training.sync import require_synced, sync

if TYPE_CHECKING:
    import torch

__all__ = [
    "Batch",
    "Parity",
    "arm",
    "batch",
    "compare",
    "contract",
    "disarm",
    "exact",
    "gradients",
    "logprobs",
    "require_synced",
    "sync",
]


def arm(model: torch.nn.Module, sampler: Any = None, *, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Give a transformers model the sampler's bits, in place. Returns the model.

    sampler: an LLM or AsyncLLM of this process, a server's URL, a saved contract (a path) or a contract (a dict). None
    arms without a comparison of both sides. dtype: what the model computes in, by default its parameters' dtype. With
    parameters in fp32 and dtype=torch.bfloat16, the parameters are master weights: each operator rounds them, and their
    gradients are fp32.
    Raises UnsupportedFeature with the name of what has no cover, and ContractBroken with the first difference between
    the trainer and the sampler.
    """
    inner = huggingface.unwrapped(model)
    own = next(inner.parameters())
    dtype = own.dtype if dtype is None else dtype
    agreed = {} if sampler is None else contract.of(sampler)
    if sampler is not None:
        devices.prepare(own.device.type)
        contract.check(agreed, inner, dtype)
        devices.implementation(own.device.type).agree(agreed)
    state = huggingface.arm(model, dtype, agreed.get("tensor_parallel_size", 1))
    if sampler is not None:
        state.contract, state.form = agreed, contract.form(agreed)
    return model


@contextlib.contextmanager
def exact(
    model: torch.nn.Module, sampler: Any = None, *, dtype: torch.dtype | None = None
) -> Iterator[torch.nn.Module]:
    """Arm a model for the time of a context."""
    arm(model, sampler, dtype=dtype)
    try:
        yield model
    finally:
        disarm(model)
