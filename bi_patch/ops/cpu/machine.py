"""The bundled CPU kernels: built once a machine, loaded once a process, and what identifies them in certificates."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from bi_patch.errors import CertificateFailed

if TYPE_CHECKING:
    import torch

_isa: str | None = None
_library = ""  # the built library's name: instruction set and digest of sources and compiler


def load_kernels(cache: Path) -> str:
    """Build (first time on a machine) and load the bundled kernels; returns their instruction set.

    Raises CertificateFailed when they cannot be built: without them CPU attention has no invariant route.
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


@functools.cache
def device() -> str:
    """The CPU's model, instruction set of the bundled kernels, and number of threads."""
    import torch

    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    amx = "amx" if torch.cpu._is_amx_tile_supported() else "no amx"
    return f"{model}, {amx}, {_isa}, {torch.get_num_threads()} threads"


def libraries(library: str) -> str:
    """Versions of the libraries whose CPU kernels are certified: `library`, e.g. "vllm 0.33.0", and PyTorch."""
    import torch

    return f"{library}, torch {torch.__version__}"


def kernels_digest() -> str:
    """What identifies the bundled kernels: their instruction set, sources and compiler."""
    return _library


def covers(x: torch.Tensor, weight: torch.Tensor | None = None) -> bool:
    """Whether the bundled row kernels take x: their dtypes, and a weight of the same."""
    import torch

    known = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and (weight is None or weight.dtype == x.dtype)
