"""The bundled CPU kernels, and what identifies them in certificates.

The kernels are built once per machine and loaded once per process.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from bi_patch.errors import CertificateFailed

if TYPE_CHECKING:
    import torch

_isa: str | None = None
_library = ""  # the built library's name: instruction set and digest of sources and compiler


def load_kernels(cache: Path) -> str:
    """Load the bundled kernels; build them first if `cache` has no build. Returns their instruction set.

    Raises CertificateFailed if the kernels cannot be built: no other kernel computes CPU attention in one order.
    """
    global _isa, _library
    if _isa is None:
        from bi_patch.kernels import cpu as kernels

        try:
            _isa = kernels.load(cache / "kernels")
            _library = kernels.build(cache / "kernels").stem
        except kernels.KernelBuildError as error:
            raise CertificateFailed(f"the bundled CPU kernels are not available: {error}") from error
    return _isa


def instruction_set() -> str:
    """The instruction set of the loaded kernels, e.g. "amx_bf16"; "" before they are loaded."""
    return _isa or ""


@functools.cache
def allow_tiles() -> bool:
    """Whether this process may use AMX tiles. Asks Linux for them, once a process: without, they end it with SIGILL."""
    import torch

    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


@functools.cache
def device() -> str:
    """The device as a certificate names it: the CPU's model, AMX or not, the kernels' instruction set, the threads."""
    import torch

    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    amx = "amx" if torch.cpu._is_amx_tile_supported() else "no amx"
    return f"{model}, {amx}, {_isa}, {torch.get_num_threads()} threads"


# By these variables, oneDNN, MKL and PyTorch take other kernels on the same machine.
_SWITCHES = ("ATEN_CPU_CAPABILITY", "DNNL_", "MKL_", "ONEDNN_")


def libraries(library: str) -> str:
    """The versions of the libraries whose CPU kernels are certified, and the variables that choose their kernels.

    library: e.g. "vllm 0.33.0".
    """
    import torch

    return ", ".join([library, f"torch {torch.__version__}", *switches()])


def switches() -> list[str]:
    """The variables of this process by which libraries take other kernels."""
    return [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_SWITCHES)]


def kernels_digest() -> str:
    """The name of the built kernels, which holds their instruction set and a digest of their sources and compiler."""
    return _library


def kernels() -> dict[str, str]:
    """What decides the bits of this device's kernels, once they are loaded: {"kernels": ..., "device": ...}.

    The number of threads decides no bit. A sampler and its trainer compare these values.
    """
    return {"kernels": kernels_digest(), "device": device().rpartition(",")[0]}


def covers(x: torch.Tensor, weight: torch.Tensor | None = None) -> bool:
    """Whether the bundled row kernels take x: bf16, fp16 or fp32, and a weight (if any) of x's dtype."""
    import torch

    known = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and (weight is None or weight.dtype == x.dtype)
