"""The trainer's operators on CPU: the sampler's kernels, each with its backward.

Rules for every folder of `bi_patch.training.devices.FOLDERS`:

- Rows are [rows, ...] without padding between batch and sequence. A row's bits depend on this row alone, or in
  attention on the rows of its own sequence.
- Forward: the sampler's kernel and its bits. A weight in fp32 beside rows in bf16 or fp16 is a master weight, and is
  rounded to the rows' dtype first.
- Backward: sums in fp32, in an order that a second run repeats. The gradient of rows has the rows' dtype, and does not
  depend on the other rows. The gradient of a weight has the weight's dtype.
- A gradient that nobody asked for is an empty tensor, `empty(0)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bi_patch.errors import UnsupportedFeature
from bi_patch.platforms.features import variables

CALLS_VLLM = False  # only experts call a kernel of the installed vLLM


def prepare(cache: Path) -> None:
    """Load the kernels, and ask Linux for AMX tiles, before the first operator runs.

    cache: the folder of built kernels and certificates.
    Raises CertificateFailed if the kernels cannot be built, and UnsupportedFeature for variables of OpenMP with which
    an engine would be refused.
    """
    from bi_patch.ops.cpu import machine

    if found := variables.of_threads():
        raise UnsupportedFeature(
            f"training.threads: nobody has examined {', '.join(found)}, which may give a kernel fewer threads than it "
            "asked for. Unset it"
        )
    machine.load_kernels(cache)
    machine.allow_tiles()


def cover(head_size: int, experts: bool) -> None:
    """Raise UnsupportedFeature for a model that the operators do not cover. experts: whether its layers choose them."""


def agree(contract: dict[str, Any]) -> None:
    """Raise ContractBroken if this process cannot repeat the sampler's transforms. On CPU, bi_patch's own code does."""


def kernels() -> dict[str, str]:
    """What decides the bits of this device's kernels: {"kernels": ..., "device": ...}, after `prepare`."""
    from bi_patch.ops.cpu import machine

    return machine.kernels()
