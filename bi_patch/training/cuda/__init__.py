"""The trainer's operators on CUDA: the sampler's kernels with a backward each. bi_patch.training.cpu has the rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CALLS_VLLM = True  # every model calls kernels of the installed vLLM


def prepare(cache: Path) -> None:
    """Load the libraries and vLLM's kernels, before the first operator runs. cache: the folder of certificates.

    Raises MissingDependency without vLLM, and UnsupportedDevice on a GPU without FlashAttention 3.
    """
    from bi_patch.errors import UnsupportedDevice
    from bi_patch.ops.cuda import machine
    from bi_patch.training.cuda import linear, vllm_kernels

    if not machine.is_hopper():
        raise UnsupportedDevice(
            "training.device: bi_patch trains on Hopper GPUs, whose FlashAttention 3 it knows. Use one"
        )
    linear.certificates_in(cache)
    vllm_kernels.load()


def cover(head_size: int, experts: bool) -> None:
    """Raise UnsupportedFeature for a model that the operators do not cover. experts: whether its layers choose them."""
    from bi_patch.errors import UnsupportedFeature

    if head_size < 16 or head_size & (head_size - 1):
        raise UnsupportedFeature(
            f"training.rotation: heads of {head_size} elements take another rotation in the sampler on CUDA than the "
            "bundled kernel, which covers powers of two from 16 on. Use another model"
        )


def agree(contract: dict[str, Any]) -> None:
    """Raise ContractBroken if this process cannot repeat the sampler's transforms: its vLLM must be armed for them."""
    from bi_patch.errors import ContractBroken
    from bi_patch.training.cuda import vllm_kernels

    if contract["logprobs_mode"] == "processed_logprobs" and not vllm_kernels.truncates_as_armed():
        raise ContractBroken(
            "training.contract: the sampler's logprobs show top-k and top-p (processed_logprobs), and this process is "
            "not armed, so vLLM's own function would apply them. Import bi_patch before vllm, without BI_PATCH=0"
        )


def kernels() -> dict[str, str]:
    """What decides the bits of this device's kernels: {"kernels": ..., "device": ...}, after `prepare`."""
    from bi_patch.ops.cuda import machine

    return machine.kernels()
