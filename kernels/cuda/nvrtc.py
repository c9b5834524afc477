"""Compiles CUDA source at run time with NVRTC, and loads and launches kernels through the CUDA driver.

PyTorch's CUDA builds bring NVRTC. Compiling needs no GPU. The constants are from cuda.h (CUDA 12 and 13).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path

# CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, and .._PREFERRED_SHARED_MEMORY_CARVEOUT in percent.
_SHARED_BYTES, _CARVEOUT = 8, 9
_CLUSTER = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_INVALID_CLUSTER_SIZE = 912  # CUDA_ERROR_INVALID_CLUSTER_SIZE
MOST_BLOCKS = 65535  # of a grid's second and third dimension: some kernels give each request of a step a block there
folder: Path | None = None  # keeps compiled code for later processes; None keeps none


class CompileError(RuntimeError):
    """NVRTC is missing, or a call of NVRTC or the driver failed; the message has the compiler's log."""


@functools.cache
def library(major: int) -> ctypes.CDLL:
    """Load NVRTC of a CUDA major version. Raises CompileError if it is not installed."""
    name = f"libnvrtc.so.{major}"
    beside = [str(found) for folder in sys.path for found in Path(folder or ".").glob(f"nvidia/*/lib/{name}")]
    for path in (name, *beside):
        try:
            if path != name:
                # NVRTC opens libnvrtc-builtins by name, which finds the library only if it is already loaded.
                for builtins in Path(path).parent.glob("libnvrtc-builtins.so.*"):
                    ctypes.CDLL(str(builtins))
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise CompileError(f"{name} was not found: it comes with PyTorch's CUDA builds (package nvidia-cuda-nvrtc)")


def source(*names: str) -> str:
    """The text of files of this folder, one after the other."""
    beside = Path(__file__).resolve().parent
    return "".join((beside / name).read_text() for name in names)


@functools.cache
def target(device: int) -> tuple[str, int]:
    """What kernels for a device are compiled for: the architecture (e.g. sm_90), and CUDA's major version."""
    import torch

    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return arch, int(str(torch.version.cuda).split(".")[0])


def compile(source: str, arch: str, defines: dict[str, object], major: int) -> bytes:
    """Compile `source` to a cubin for `arch` (e.g. sm_90), or read the cubin from `folder`.

    Raises CompileError with the log.
    """
    nvrtc = library(major)
    options = [f"--gpu-architecture={arch}", "--std=c++17", "--use_fast_math"]
    options += [f"-D{name}={value}" for name, value in defines.items()]
    file = _file(nvrtc, source, options)
    held = _read(file)
    if held is None:
        held = _compile(nvrtc, source, options)
        _write(file, held)
    return held


def _file(nvrtc, source: str, options: list[str]) -> Path | None:
    """Where the cubin of this source, these options and this release of NVRTC is kept."""
    if folder is None:
        return None
    release = c_int(), c_int()
    _check(nvrtc.nvrtcVersion(*map(byref, release)), "nvrtcVersion")
    text = "\0".join([source, *options, *(str(part.value) for part in release)])
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.cubin"


def _read(file: Path | None) -> bytes | None:
    """The cubin in `file`, which begins with its digest, or None if there is none, or a damaged one."""
    try:
        held = file.read_bytes() if file is not None else b""
    except OSError:
        return None
    return held[32:] if held and hashlib.sha256(held[32:]).digest() == held[:32] else None


def _write(file: Path | None, cubin: bytes) -> None:
    """Keep a cubin; a folder that cannot be written keeps none."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        with os.fdopen(descriptor, "wb") as out:
            out.write(hashlib.sha256(cubin).digest() + cubin)
        os.chmod(temporary, 0o644)  # users may share a cache
        os.replace(temporary, file)
    except OSError:
        return


def _compile(nvrtc, source: str, options: list[str]) -> bytes:
    program = c_void_p()
    _check(nvrtc.nvrtcCreateProgram(byref(program), source.encode(), b"kernel.cu", 0, None, None), "nvrtcCreateProgram")
    held = (c_char_p * len(options))(*(option.encode() for option in options))
    code = nvrtc.nvrtcCompileProgram(program, len(options), held)
    if code:
        raise CompileError(f"NVRTC, status {code}: {_text(nvrtc, program)}")
    size = c_size_t()
    _check(nvrtc.nvrtcGetCUBINSize(program, byref(size)), "nvrtcGetCUBINSize")
    cubin = ctypes.create_string_buffer(size.value)
    _check(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
    nvrtc.nvrtcDestroyProgram(byref(program))
    return cubin.raw


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute that holds the dimensions of a cluster."""

    _fields_ = [("id", c_int), ("pad", c_int), ("cluster", c_uint * 3), ("rest", ctypes.c_char * 52)]


class _Launch(ctypes.Structure):
    """CUlaunchConfig. sizes: grid (3), block (3), bytes of dynamic shared memory."""

    _fields_ = [("sizes", c_uint * 7), ("stream", c_void_p), ("attributes", c_void_p), ("number", c_uint)]


class Function:
    """A kernel of a cubin, loaded on the current device. The object keeps the cubin alive."""

    def __init__(self, cubin: bytes, name: str, threads: int, shared_bytes: int):
        self._driver, self._module, self._function = ctypes.CDLL("libcuda.so.1"), c_void_p(), c_void_p()
        self._threads, self._shared = threads, shared_bytes
        self._cubin = cubin
        _check(self._driver.cuModuleLoadData(byref(self._module), cubin), "cuModuleLoadData")
        code = self._driver.cuModuleGetFunction(byref(self._function), self._module, name.encode())
        _check(code, "cuModuleGetFunction")
        for attribute, value in ((_SHARED_BYTES, shared_bytes), (_CARVEOUT, 100)):
            _check(self._driver.cuFuncSetAttribute(self._function, attribute, value), "cuFuncSetAttribute")

    def clusters(self, blocks: int) -> int:
        """How many clusters of `blocks` blocks run at once, 0 if a cluster of this size does not fit on the device.

        A cluster needs neighbouring multiprocessors.
        """
        attribute = _Attribute(_CLUSTER, 0, (c_uint * 3)(blocks, 1, 1))
        sizes = (c_uint * 7)(blocks, 1, 1, self._threads, 1, 1, self._shared)
        launch, found = _Launch(sizes, None, ctypes.addressof(attribute), 1), c_int()
        code = self._driver.cuOccupancyMaxActiveClusters(byref(found), self._function, byref(launch))
        if code == _INVALID_CLUSTER_SIZE:
            return 0
        _check(code, "cuOccupancyMaxActiveClusters")
        return found.value

    def __call__(self, grid: tuple[int, ...], stream: int, arguments: Sequence[ctypes._SimpleCData]) -> None:
        """Launch on `stream`. grid: two or three numbers of blocks. Each argument has the size of its parameter."""
        x, y, z = (*grid, 1)[:3]
        held = (c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        code = self._driver.cuLaunchKernel(
            self._function, x, y, z, self._threads, 1, 1, self._shared, c_void_p(stream), held, None
        )
        _check(code, "cuLaunchKernel")


def _text(nvrtc: ctypes.CDLL, program: c_void_p) -> str:
    size = c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, byref(size))
    log = ctypes.create_string_buffer(max(1, size.value))
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.value.decode(errors="replace")


def _check(code: int, call: str) -> None:
    if code:
        raise CompileError(f"{call}, status {code}")
