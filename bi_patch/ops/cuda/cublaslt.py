"""Direct calls of cuBLASLt, with an algorithm that is chosen once per problem and number of rows, and never splits K.

PyTorch asks cuBLASLt for an algorithm in every call. If the workspace is too small for split-K, PyTorch does not cache
the answer, and each call takes 0.2 ms of host time, more than a whole layer. Here a caller keeps the algorithm and
passes it to every call. The request asks for no workspace, no reduction scheme and 16-byte alignment. `Gemm.offers`
drops algorithms that split K anyway. The numbers below are those of cublasLt.h (CUDA 12 and 13).
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import TYPE_CHECKING, NamedTuple

from bi_patch.errors import CertificateFailed

if TYPE_CHECKING:
    import torch

_COMPUTE_32F = 68
_R_32F, _TYPES = 0, {"float32": 0, "float16": 2, "bfloat16": 14}
_DESC_TRANSA, _DESC_EPILOGUE, _DESC_BIAS = 3, 7, 8
_OP_T, _EPILOGUE_BIAS = 1, 4
_PREF_WORKSPACE, _PREF_REDUCTION, _PREF_ALIGNMENTS = 1, 3, (5, 6, 7, 8)
# The attributes that identify an algorithm: id, tile, split-K, reduction, custom option, stages, inner shape, cluster.
# The swizzling attribute is left out: it changes the order of blocks and no sum.
_ALGO = {"id": 0, "tile": 1, "split_k": 2, "reduction": 3, "custom": 5, "stages": 6, "inner": 7, "cluster": 8}
_SHORT = ("inner", "cluster")  # 16-bit attributes
ALIGNMENT = 16
_OFFERS = 8  # the maximum number of algorithms asked for


class _Opaque(ctypes.Structure):
    _fields_ = (("data", c_uint64 * 8),)


class _Result(ctypes.Structure):
    _fields_ = (
        ("algorithm", _Opaque),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class Kind(NamedTuple):
    """An algorithm's configuration, in the numbers of cublasLt.h."""

    id: int
    tile: int
    split_k: int
    reduction: int
    custom: int
    stages: int
    inner: int
    cluster: int


class Algorithm:
    """One of the library's algorithms for a problem and a number of rows.

    x, out: the library's layouts of these matrices. opaque: the algorithm as the library stores it. kind: the
    algorithm's configuration.
    """

    __slots__ = ("kind", "opaque", "out", "x")

    def __init__(self, x: c_void_p, out: c_void_p, opaque: _Opaque, kind: Kind):
        self.x, self.out, self.opaque, self.kind = x, out, opaque, kind


class Gemm:
    """out [M, N] = x [M, K] @ weight [N, K].T + bias [N].

    All tensors have one dtype (bf16, fp16 or fp32), packed rows and pointers aligned to 16 bytes. Raises
    CertificateFailed for another dtype, and if the library reports an error.
    """

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool):
        name = str(dtype).removeprefix("torch.")
        if name not in _TYPES:
            raise CertificateFailed(f"cublaslt: no GEMM for {dtype}")
        self.n, self.k, self.dtype, self.bias = n, k, dtype, bias
        self._library, self._handle = load()
        self._type = _TYPES[name]
        self._desc = c_void_p()
        self._check(self._library.cublasLtMatmulDescCreate(byref(self._desc), _COMPUTE_32F, _R_32F), "desc")
        self._set(_DESC_TRANSA, c_int(_OP_T))
        if bias:
            self._set(_DESC_EPILOGUE, c_uint32(_EPILOGUE_BIAS))
        self._weight = self._layout(k, n)
        self._kinds: dict[bytes, Kind] = {}  # a cache: reading an algorithm's attributes takes longer
        self._alpha, self._beta = c_float(1.0), c_float(0.0)
        self._preference = self._request()

    def offers(self, rows: int) -> list[Algorithm]:
        """The library's algorithms for a number of rows, one per kind, in the library's order of estimated speed.

        The list is empty if all algorithms split K. Every call asks the library again.
        """
        # Column-major, as the library sees it: out [N, M] = weight [K, N]^T @ x [K, M].
        x, out = self._layout(self.k, rows), self._layout(self.n, rows)
        results, count = (_Result * _OFFERS)(), c_int()
        code = self._library.cublasLtMatmulAlgoGetHeuristic(
            self._handle, self._desc, self._weight, x, out, out, self._preference, _OFFERS, results, byref(count)
        )
        offered: dict[Kind, Algorithm] = {}
        for result in results[: 0 if code else count.value]:
            if result.state or result.workspace:
                continue
            kind = self._kind(result.algorithm)
            if kind.split_k <= 1 and not kind.reduction and kind not in offered:
                # Copy: a result is a part of the array and would keep the whole array in memory.
                offered[kind] = Algorithm(x, out, _Opaque.from_buffer_copy(result.algorithm), kind)
        return list(offered.values())

    def __call__(self, algorithm: Algorithm, x: int, weight: int, bias: int | None, out: int, stream: int) -> None:
        """Enqueue the product on `stream`. x, weight, bias and out are device addresses; stream is a CUDA stream's."""
        if bias is not None:
            self._set(_DESC_BIAS, c_void_p(bias))
        code = self._library.cublasLtMatmul(
            self._handle,
            self._desc,
            byref(self._alpha),
            c_void_p(weight),
            self._weight,
            c_void_p(x),
            algorithm.x,
            byref(self._beta),
            c_void_p(out),
            algorithm.out,
            c_void_p(out),
            algorithm.out,
            byref(algorithm.opaque),
            None,
            c_size_t(0),
            c_void_p(stream),
        )
        if code:
            self._check(code, "cublasLtMatmul")

    def _kind(self, opaque: _Opaque) -> Kind:
        known = self._kinds.get(bytes(opaque))
        if known is not None:
            return known
        values = {}
        for name, attribute in _ALGO.items():
            value, written = c_uint32(), c_size_t()
            size = 2 if name in _SHORT else 4
            code = self._library.cublasLtMatmulAlgoConfigGetAttribute(
                byref(opaque), attribute, byref(value), c_size_t(size), byref(written)
            )
            self._check(code, f"algorithm attribute {name}")
            values[name] = value.value
        kind = self._kinds[bytes(opaque)] = Kind(**values)
        return kind

    def _layout(self, rows: int, cols: int) -> c_void_p:
        layout = c_void_p()
        code = self._library.cublasLtMatrixLayoutCreate(
            byref(layout), self._type, c_uint64(rows), c_uint64(cols), c_int64(rows)
        )
        self._check(code, "layout")
        return layout

    def _request(self) -> c_void_p:
        preference = c_void_p()
        self._check(self._library.cublasLtMatmulPreferenceCreate(byref(preference)), "preference")
        wanted = [(_PREF_WORKSPACE, c_uint64(0)), (_PREF_REDUCTION, c_uint32(0))]
        wanted += [(attribute, c_uint32(ALIGNMENT)) for attribute in _PREF_ALIGNMENTS]
        for attribute, value in wanted:
            code = self._library.cublasLtMatmulPreferenceSetAttribute(
                preference, attribute, byref(value), c_size_t(ctypes.sizeof(value))
            )
            self._check(code, f"preference {attribute}")
        return preference

    def _set(self, attribute: int, value) -> None:
        code = self._library.cublasLtMatmulDescSetAttribute(
            self._desc, attribute, byref(value), c_size_t(ctypes.sizeof(value))
        )
        if code:
            self._check(code, f"attribute {attribute}")

    @staticmethod
    def _check(code: int, what: str) -> None:
        if code:
            raise CertificateFailed(f"cublaslt: {what} failed with status {code}")


@functools.cache
def load():
    """The cuBLASLt library that PyTorch has loaded, and a handle for the current device.

    Raises CertificateFailed if the library gives no handle.
    """
    import torch

    torch.cuda.current_blas_handle()  # loads the library
    library = ctypes.CDLL(f"libcublasLt.so.{str(torch.version.cuda).split('.')[0]}")
    library.cublasLtGetVersion.restype = c_size_t
    handle = c_void_p()
    code = library.cublasLtCreate(byref(handle))
    if code:
        raise CertificateFailed(f"cublaslt: no handle, status {code}")
    return library, handle


def version() -> int:
    return load()[0].cublasLtGetVersion()
