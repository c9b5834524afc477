"""What every Ascend order shares: the libraries that must be there, the chip, and the optional AscendC operators.

`batch_invariant_ops` is a prebuilt package of AscendC operators. Where it is installed and its schemas are the ones
that vLLM-Ascend 0.23 calls, they serve what they can; the bundled Triton kernels serve the rest, or everything.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, NamedTuple

from bi_patch.errors import MissingDependency, UnsupportedDevice

if TYPE_CHECKING:
    from collections.abc import Callable

    from bi_patch.kernels.ascend.chips import Chip


class Library(NamedTuple):
    """distribution: its name for pip. module: what is imported. versions: those that the seams were written
    for."""

    distribution: str
    module: str
    versions: tuple[str, ...]


# The versions that vLLM-Ascend 0.23.0 asks for, and those that the checks on CPU run with.
TORCH_NPU = Library("torch-npu", "torch_npu", ("2.10.0.post4", "2.13.0"))
TRITON = Library("triton-ascend", "triton", ("3.2.2", "3.2.0"))
ASCENDC = "batch_invariant_ops"
# Positional arguments that vLLM-Ascend 0.23 passes, by type, and what it takes back. A dimension is one int; a list
# of fixed length takes that too.
SCHEMAS = {
    "npu_mm_batch_invariant": (("Tensor", "Tensor"), ("Tensor",)),
    "npu_matmul_batch_invariant": (("Tensor", "Tensor"), ("Tensor",)),
    "npu_reduce_sum_batch_invariant": (("Tensor", "int", "bool"), ("Tensor",)),
    "npu_fused_infer_attention_score_batch_invariant": (("Tensor", "Tensor", "Tensor"), ("Tensor", "Tensor")),
}
# Keyword arguments of attention that vLLM-Ascend's one causal call passes.
ATTENTION_ARGUMENTS = (
    "atten_mask",
    "block_table",
    "input_layout",
    "block_size",
    "actual_seq_lengths",
    "actual_seq_lengths_kv",
    "num_key_value_heads",
    "num_heads",
    "scale",
    "sparse_mode",
)


def require() -> None:
    """Raise MissingDependency, saying what to install, unless CANN, torch_npu and triton-ascend are there."""
    _version(TORCH_NPU)
    try:
        importlib.import_module(TORCH_NPU.module)
    except (ImportError, OSError) as error:
        raise MissingDependency(
            f"torch_npu is installed but cannot be imported: {error}. Where a lib*.so is named, CANN is "
            "missing: install the CANN toolkit and kernels of your chip, then `source set_env.sh` in this shell"
        ) from error
    if not ascendc_installed():
        _version(TRITON, f", or the AscendC package {ASCENDC} and triton-ascend")
    else:
        _version(TRITON)  # what AscendC does not have is served by the bundled kernels


def _version(library: Library, otherwise: str = "") -> None:
    wanted = library.versions[0]
    try:
        found = importlib.metadata.version(library.distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependency(
            f"{library.distribution} is not installed: pip install {library.distribution}=={wanted}{otherwise}"
        ) from error
    if found not in library.versions:
        raise MissingDependency(
            f"{library.distribution} {found} was not checked with these seams: pip install "
            f"{library.distribution}=={wanted} (checked: {', '.join(library.versions)})"
        )


@functools.cache
def chip() -> Chip:
    """The current NPU's entry in the table of chips. Raises UnsupportedDevice where it has none."""
    import torch

    from bi_patch.kernels.ascend import chips

    name = torch.npu.get_device_name(torch.npu.current_device())
    try:
        return chips.find(name)
    except chips.UnknownChip as error:
        raise UnsupportedDevice(f"{error.args[0]}. Set BI_PATCH=0 to run without bi_patch") from error


def ascendc_installed() -> bool:
    """Whether the AscendC package is there, without importing it."""
    return importlib.util.find_spec(ASCENDC) is not None


@functools.cache
def ascendc() -> dict[str, Callable]:
    """The AscendC operators by name; empty where the package is not installed.

    Raises MissingDependency when the package is there but an operator is missing or takes other arguments.
    """
    if not ascendc_installed():
        return {}
    import torch

    importlib.import_module(ASCENDC)
    found = {}
    for name, (arguments, returns) in SCHEMAS.items():
        packet = getattr(getattr(torch.ops, ASCENDC), name, None)
        if packet is None:
            raise MissingDependency(f"{ASCENDC} has no operator {name}: install its release for vLLM-Ascend 0.23")
        names = ATTENTION_ARGUMENTS if "attention" in name else ()
        if not any(_accepts(getattr(packet, o)._schema, arguments, returns, names) for o in packet.overloads()):
            raise MissingDependency(
                f"{ASCENDC}.{name} takes other arguments than vLLM-Ascend 0.23 passes ({', '.join(arguments)}): "
                "install its release for vLLM-Ascend 0.23, or remove the package to use the bundled kernels"
            )
        found[name] = packet
    return found


def _accepts(schema, arguments: tuple[str, ...], returns: tuple[str, ...], names: tuple[str, ...]) -> bool:
    """Whether a call with these positional types and keyword names fits the schema and gives these
    results."""
    taken = ["int" if a.N == 1 else str(a.type) for a in schema.arguments]
    rest = schema.arguments[len(arguments) :]
    return (
        tuple(taken[: len(arguments)]) == arguments
        and tuple(str(r.type) for r in schema.returns) == returns
        and all(a.has_default_value() for a in rest)
        and set(names) <= {a.name for a in schema.arguments}
    )
