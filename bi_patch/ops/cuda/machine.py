"""What all operations on CUDA share: the library switches that forbid split-K, and the parts of a certificate's key.

Two switches forbid split-K. A workspace too small for partial sums covers every dtype and costs no speed on Hopper.
PyTorch's switch masks reduction schemes in cuBLASLt for bf16 and fp16. PyTorch's switch alone is not enough: with a
full workspace, some results still differed, and some kernels were many times slower.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# cuBLAS reads these variables when a handle is created, PyTorch at its first matrix product.
WORKSPACE = {"CUBLASLT_WORKSPACE_SIZE": "1", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
# By these variables, cuBLAS takes other kernels, and Triton compiles other products.
_SWITCHES = ("CUBLAS", "NVIDIA_TF32_OVERRIDE", "TRITON_DEFAULT_FP_FUSION", "TRITON_F32_DEFAULT")
# From this compute capability on, cuBLASLt keeps one order if it does not split K. For older devices, bi_patch has no
# evidence of this.
VENDOR_CAPABILITY = (9, 0)


def forbid_split_k() -> None:
    """Switch split-K off in this process's libraries, for every matrix product. A second call changes nothing."""
    import torch

    os.environ.update(WORKSPACE)  # replaces the value that upstream's mode wrote
    matmul = torch.backends.cuda.matmul
    # (reduced precision, split-K)
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    matmul.allow_fp16_reduced_precision_reduction = (False, False)
    matmul.fp32_precision = "ieee"
    torch.backends.cuda.preferred_blas_library("cublaslt")


def vendor_allowed() -> bool:
    """Whether bi_patch may certify the vendor's GEMM on this device."""
    import torch

    return torch.cuda.get_device_capability() >= VENDOR_CAPABILITY


@functools.cache
def is_hopper() -> bool:
    """Whether the current device has compute capability 9.0."""
    import torch

    return torch.cuda.get_device_capability() == (9, 0)


@functools.cache
def _raw_stream():
    import torch

    return torch._C._cuda_getCurrentRawStream


def stream(device: int) -> int:
    """The handle of the current stream of device number `device`. PyTorch's public function makes an object first,
    which takes several times as long."""
    return _raw_stream()(device)


@functools.cache
def shared_memory() -> int:
    """The bytes of shared memory that one block may use on the current device."""
    import torch

    return torch.cuda.get_device_properties(torch.cuda.current_device()).shared_memory_per_block_optin


@functools.cache
def cache_bytes() -> int:
    """The size of the current device's L2 cache in bytes."""
    import torch

    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


@functools.cache
def processors() -> int:
    """The number of multiprocessors of the current device."""
    import torch

    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


@functools.cache
def device() -> str:
    """The device as a certificate names it: model, compute capability, multiprocessors."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{properties.name} sm_{properties.major}{properties.minor} x{properties.multi_processor_count}"


@functools.cache
def libraries() -> str:
    """The versions of all libraries that choose or compile a kernel, and the variables that influence the choice."""
    import torch
    import triton

    from bi_patch.ops.cuda import cublaslt

    own = [f"{name}={os.environ.get(name, '')}" for name in WORKSPACE]
    return (
        f"torch {torch.__version__} cuda {torch.version.cuda} cublaslt {cublaslt.version()} "
        f"driver {_driver_version()} triton {triton.__version__} {' '.join([*own, *switches()])}"
    )


def switches() -> list[str]:
    """The variables of this process by which libraries take other kernels, except those that arming sets."""
    found = sorted(name for name in os.environ if name.startswith(_SWITCHES) and name not in WORKSPACE)
    return [f"{name}={os.environ[name]}" for name in found]


@functools.cache
def kernels_digest(kind: str = "triton") -> str:
    """The digest of the sources of the bundled kernels in kernels/<kind>."""
    from bi_patch import kernels

    files = (path for path in (Path(next(iter(kernels.__path__))) / kind).iterdir() if path.is_file())
    content = b"".join(path.read_bytes() for path in sorted(files))
    return hashlib.sha256(content).hexdigest()[:16]


def kernels_digests() -> str:
    """The digests of the bundled kernels in Triton and in CUDA C++, for a certificate that launches both."""
    return f"{kernels_digest()} {kernels_digest('cuda')}"


def kernels() -> dict[str, str]:
    """What decides the bits of this device's kernels: {"kernels": ..., "device": ...}.

    Triton and CUDA compile the kernels' sources, and the digest of bi_patch's code covers the sources. A sampler and
    its trainer compare these values.
    """
    import torch
    import triton

    return {
        "kernels": f"cuda {torch.version.cuda}, triton {triton.__version__}",
        "device": torch.cuda.get_device_name(),
    }


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _driver_version() -> int:
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value
