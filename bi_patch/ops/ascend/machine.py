"""What all operations on Ascend share: the required libraries, the chip, and the optional AscendC operators.

`batch_invariant_ops` is a prebuilt package of AscendC operators. Where the package is installed, its operators serve
the calls that they cover, provided that their schemas are those that vLLM-Ascend 0.23 calls. The bundled Triton kernels
serve all other calls.
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
    """A required library. distribution: its name for pip. module: its import name. versions: the versions that the
    seams were written for."""

    distribution: str
    module: str
    versions: tuple[str, ...]


# First the version that vLLM-Ascend 0.23.0 requires, then the version that the tests on CPU use.
TORCH_NPU = Library("torch-npu", "torch_npu", ("2.10.0.post4", "2.13.0"))
TRITON = Library("triton-ascend", "triton", ("3.2.2", "3.2.0"))
ASCENDC = "batch_invariant_ops"
# By AscendC operator: the types of the positional arguments that vLLM-Ascend 0.23 passes, and the types of the results.
# vLLM-Ascend passes a dimension as one int, which a schema with a list of length 1 accepts too.
SCHEMAS = {
    "npu_mm_batch_invariant": (("Tensor", "Tensor"), ("Tensor",)),
    "npu_matmul_batch_invariant": (("Tensor", "Tensor"), ("Tensor",)),
    "npu_reduce_sum_batch_invariant": (("Tensor", "int", "bool"), ("Tensor",)),
    "npu_fused_infer_attention_score_batch_invariant": (("Tensor", "Tensor", "Tensor"), ("Tensor", "Tensor")),
}
# The keyword arguments that vLLM-Ascend passes to attention in its causal call.
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
    """Raise MissingDependency, which says what to install, unless CANN, torch_npu and triton-ascend are installed."""
    _version(TORCH_NPU)
    try:
        importlib.import_module(TORCH_NPU.module)
    except (ImportError, OSError) as error:
        raise MissingDependency(
            f"torch_npu is installed but cannot be imported: {error}. If the error names a lib*.so, CANN is missing: "
            "install the CANN toolkit and kernels for your chip, then run `source set_env.sh` in this shell"
        ) from error
    if not ascendc_installed():
        _version(TRITON, f", or the AscendC package {ASCENDC} and triton-ascend")
    else:
        _version(TRITON)  # the bundled kernels serve the calls that AscendC does not cover


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
            f"{library.distribution} {found} was not checked with bi_patch: pip install "
            f"{library.distribution}=={wanted} (checked: {', '.join(library.versions)})"
        )


def switches() -> list[str]:
    """The variables of this process by which libraries take other kernels: none that bi_patch knows."""
    return []


@functools.cache
def chip() -> Chip:
    """The current NPU's entry in the table of chips. Raises UnsupportedDevice for an NPU that the table lacks."""
    import torch

    from bi_patch.kernels.ascend import chips

    name = torch.npu.get_device_name(torch.npu.current_device())
    try:
        return chips.find(name)
    except chips.UnknownChip as error:
        raise UnsupportedDevice(f"{error.args[0]}. Set BI_PATCH=0 to run without bi_patch") from error


def ascendc_installed() -> bool:
    """Whether the AscendC package is installed. The function does not import the package."""
    return importlib.util.find_spec(ASCENDC) is not None


@functools.cache
def ascendc() -> dict[str, Callable]:
    """The AscendC operators by name; empty if the package is not installed.

    Raises MissingDependency if the package is installed but lacks an operator, or if an operator's schema does not fit
    the calls of vLLM-Ascend 0.23.
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
                f"{ASCENDC}.{name} does not take the arguments that vLLM-Ascend 0.23 passes ({', '.join(arguments)}): "
                "install its release for vLLM-Ascend 0.23, or remove the package to use the bundled kernels"
            )
        found[name] = packet
    return found


def _accepts(schema, arguments: tuple[str, ...], returns: tuple[str, ...], names: tuple[str, ...]) -> bool:
    """Whether the schema takes these positional types and keyword names, and returns these types."""
    taken = ["int" if a.N == 1 else str(a.type) for a in schema.arguments]
    rest = schema.arguments[len(arguments) :]
    return (
        tuple(taken[: len(arguments)]) == arguments
        and tuple(str(r.type) for r in schema.returns) == returns
        and all(a.has_default_value() for a in rest)
        and set(names) <= {a.name for a in schema.arguments}
    )
