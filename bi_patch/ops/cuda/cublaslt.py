"""Direct calls of cuBLASLt, with an algorithm that is chosen once per problem and number of rows, and never splits K.

PyTorch asks cuBLASLt for an algorithm in every call. If the workspace is too small for split-K, PyTorch does not cache
the answer, and each call takes 0.2 ms of host time, more than a whole layer. Here a caller keeps the algorithm and
passes it to every call. The request asks for no workspace, no reduction scheme and 16-byte alignment. `Gemm.offers`
drops algorithms that split K anyway. The numbers below are those of cublasLt.h (CUDA 12 and 13).
"""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from ctypes import byref, c_float, c_int, c_int8, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any, NamedTuple

from bi_patch.errors import CertificateFailed

if TYPE_CHECKING:
    import torch

_COMPUTE_32F = 68
_R_32F, _R_8F_E4M3, _TYPES = 0, 28, {"float32": 0, "float16": 2, "bfloat16": 14}
_DESC_POINTERS, _DESC_TRANS, _DESC_EPILOGUE, _DESC_BIAS = 2, {"a": 3, "b": 4}, 7, 8
_ON_DEVICE = 1  # where alpha and beta are read
_DESC_SCALE, _DESC_SCALE_MODE, _DESC_FAST, _DESC_BIAS_TYPE = {"a": 17, "b": 18}, {"a": 31, "b": 32}, 25, 26
# How many elements share a scale: one scale for each row; for 128 of K; for 128 rows and 128 of K.
_SCALE_ROW, _SCALE_GROUP, _SCALE_BLOCK = 3, 4, 5
_OP_N, _OP_T, _EPILOGUE_BIAS = 0, 1, 4
_PREF_WORKSPACE, _PREF_REDUCTION, _PREF_ALIGNMENTS = 1, 3, (5, 6, 7, 8)
# The attributes that identify an algorithm: id, tile, split-K, reduction, custom option, stages, inner shape, cluster.
# The swizzling attribute is left out: it changes the order of blocks and no sum.
_ALGO = {"id": 0, "tile": 1, "split_k": 2, "reduction": 3, "custom": 5, "stages": 6, "inner": 7, "cluster": 8}
_SHORT = ("inner", "cluster")  # 16-bit attributes
ALIGNMENT = 16
_NOTHING = c_size_t(0)  # bytes of workspace
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


_Matrix = tuple[int, c_void_p]  # a device address and a layout


class _Product:
    """What every product shares: the library, a description of the product, and a request for algorithms."""

    def __init__(self, dtype: torch.dtype, **operations: int):
        """operations: the library's operation on the first matrix, `a`, and on the second, `b`."""
        self._library, self._handle = load()
        self._type = _number(dtype)
        self._desc = c_void_p()
        self._check(self._library.cublasLtMatmulDescCreate(byref(self._desc), _COMPUTE_32F, _R_32F), "desc")
        for name, operation in operations.items():
            self._set(_DESC_TRANS[name], c_int(operation))
        self._kinds: dict[bytes, Kind] = {}  # a cache: reading an algorithm's attributes takes longer
        # A reference holds what it refers to.
        self._one, self._zero = byref(c_float(1.0)), byref(c_float(0.0))
        self._matmul = self._library.cublasLtMatmul
        self._preference = self._request()

    def _ask(self, a: c_void_p, b: c_void_p, out: c_void_p) -> list[tuple[_Opaque, Kind]]:
        """The library's algorithms for these layouts that do not split K, one per kind, in the library's order."""
        results, count = (_Result * _OFFERS)(), c_int()
        code = self._library.cublasLtMatmulAlgoGetHeuristic(
            self._handle, self._desc, a, b, out, out, self._preference, _OFFERS, results, byref(count)
        )
        offered: dict[Kind, _Opaque] = {}
        for result in results[: 0 if code else count.value]:
            if result.state or result.workspace:
                continue
            kind = self._kind(result.algorithm)
            if kind.split_k <= 1 and not kind.reduction and kind not in offered:
                # Copy: a result is a part of the array and would keep the whole array in memory.
                offered[kind] = _Opaque.from_buffer_copy(result.algorithm)
        return [(opaque, kind) for kind, opaque in offered.items()]

    def _enqueue(
        self, a: _Matrix, b: _Matrix, out: _Matrix, opaque: _Opaque, beta: Any, stream: int, alpha: Any = None
    ) -> None:
        """Enqueue out = alpha * (a @ b) + beta * out, as the library sees the matrices, on a CUDA stream.

        alpha, beta: references to a c_float, or device addresses where the description says so. None: 1.
        """
        into = c_void_p(out[0])
        code = self._matmul(
            self._handle,
            self._desc,
            self._one if alpha is None else alpha,
            c_void_p(a[0]),
            a[1],
            c_void_p(b[0]),
            b[1],
            beta,
            into,
            out[1],
            into,
            out[1],
            byref(opaque),
            None,
            _NOTHING,
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

    def _layout(self, rows: int, cols: int, kind: int | None = None) -> c_void_p:
        layout = c_void_p()
        code = self._library.cublasLtMatrixLayoutCreate(
            byref(layout), self._type if kind is None else kind, c_uint64(rows), c_uint64(cols), c_int64(rows)
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


class Gemm(_Product):
    """out [M, N] = x [M, K] @ weight [N, K].T + bias [N].

    All tensors have one dtype (bf16, fp16 or fp32), packed rows and pointers aligned to 16 bytes. Raises
    CertificateFailed for another dtype, and if the library reports an error.
    """

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool):
        super().__init__(dtype, a=_OP_T)
        self.n, self.k, self.dtype, self.bias = n, k, dtype, bias
        if bias:
            self._set(_DESC_EPILOGUE, c_uint32(_EPILOGUE_BIAS))
        self._weight = self._layout(k, n)
        self._lock = threading.Lock()

    def offers(self, rows: int) -> list[Algorithm]:
        """The library's algorithms for a number of rows, one per kind, in the library's order of estimated speed.

        The list is empty if all algorithms split K. Every call asks the library again.
        """
        # Column-major, as the library sees it: out [N, M] = weight [K, N]^T @ x [K, M].
        x, out = self._layout(self.k, rows), self._layout(self.n, rows)
        return [Algorithm(x, out, opaque, kind) for opaque, kind in self._ask(self._weight, x, out)]

    def __call__(self, algorithm: Algorithm, x: int, weight: int, bias: int | None, out: int, stream: int) -> None:
        """Enqueue the product on `stream`. x, weight, bias and out are device addresses; stream is a CUDA stream's."""
        first, second, into = (weight, self._weight), (x, algorithm.x), (out, algorithm.out)
        if bias is None:
            return self._enqueue(first, second, into, algorithm.opaque, self._zero, stream)
        # The library reads the description within its call, and other threads run meanwhile.
        with self._lock:
            self._set(_DESC_BIAS, c_void_p(bias))
            return self._enqueue(first, second, into, algorithm.opaque, self._zero, stream)


class FactoredGemm(Gemm):
    """out [M, N] = whole * (x [M, K] @ weight [N, K].T), where the fp32 sum is multiplied before it is rounded.

    whole: one fp32 number in the device's memory, read as the product runs, so a captured graph follows its value.
    Tensors and errors: as for Gemm.
    """

    def __init__(self, n: int, k: int, dtype: torch.dtype):
        import torch

        super().__init__(n, k, dtype, False)
        self._set(_DESC_POINTERS, c_int(_ON_DEVICE))
        # The description says of both numbers that they lie on the device.
        self._beta = torch.zeros(1, dtype=torch.float32, device="cuda")

    def __call__(self, algorithm: Algorithm, x: int, weight: int, whole: int, out: int, stream: int) -> None:
        """Enqueue the product on `stream`. x, weight, whole and out are device addresses; stream is a CUDA stream's."""
        first, second, into = (weight, self._weight), (x, algorithm.x), (out, algorithm.out)
        beta = c_void_p(self._beta.data_ptr())
        self._enqueue(first, second, into, algorithm.opaque, beta, stream, c_void_p(whole))


class ScaledGemm(_Product):
    """out [M, N] = (x [M, K] * its scales) @ (weight [N, K] * its scales).T + bias [N], from 8-bit floats (e4m3).

    group 0: one scale for each row of x, [M], and for each row of weight, [N]. group 128: one scale for each row and
    128 elements of x, K / 128 rows of [M] scales; and one for each 128 x 128 elements of weight, [N / 128, K / 128].
    Scales are fp32. out and bias are bf16 or fp16. Rows are packed, and pointers are aligned to 16 bytes; with groups,
    M is a multiple of 4. Raises CertificateFailed for another dtype, and if the library reports an error.
    """

    def __init__(self, n: int, k: int, dtype: torch.dtype, bias: bool, group: int):
        super().__init__(dtype, a=_OP_T)
        self.n, self.k, self.dtype, self.bias, self.group = n, k, dtype, bias, group
        modes = {"a": _SCALE_BLOCK, "b": _SCALE_GROUP} if group else {"a": _SCALE_ROW, "b": _SCALE_ROW}
        for name, mode in modes.items():
            self._set(_DESC_SCALE_MODE[name], c_int(mode))
            # The library asks whether there is an address, and reads nothing there before the product runs.
            self._set(_DESC_SCALE[name], c_void_p(ALIGNMENT))
        # The tensor cores' own sums; with groups, they are taken out after each group.
        self._set(_DESC_FAST, c_int8(not group))
        if bias:
            self._set(_DESC_EPILOGUE, c_uint32(_EPILOGUE_BIAS))
            self._set(_DESC_BIAS_TYPE, c_int(_number(dtype)))
        self._weight = self._layout(k, n, _R_8F_E4M3)
        self._lock = threading.Lock()

    def offers(self, rows: int) -> list[Algorithm]:
        """As Gemm.offers."""
        x, out = self._layout(self.k, rows, _R_8F_E4M3), self._layout(self.n, rows)
        return [Algorithm(x, out, opaque, kind) for opaque, kind in self._ask(self._weight, x, out)]

    def __call__(
        self,
        algorithm: Algorithm,
        x: int,
        weight: int,
        x_scale: int,
        weight_scale: int,
        bias: int | None,
        out: int,
        stream: int,
    ) -> None:
        """Enqueue the product on `stream`. All but algorithm and stream are device addresses."""
        # The library reads the description within its call, and other threads run meanwhile.
        with self._lock:
            self._set(_DESC_SCALE["a"], c_void_p(weight_scale))
            self._set(_DESC_SCALE["b"], c_void_p(x_scale))
            if bias is not None:
                self._set(_DESC_BIAS, c_void_p(bias))
            self._enqueue(
                (weight, self._weight), (x, algorithm.x), (out, algorithm.out), algorithm.opaque, self._zero, stream
            )


class WeightGradient(_Product):
    """out [N, K] = grad [M, N].T @ x [M, K] + beta * out, for one M, by the library's first offer.

    grad and x have one dtype (bf16, fp16 or fp32); out has the same dtype, or fp32. Rows are packed, and pointers are
    aligned to 16 bytes. The sizes alone decide the algorithm, so equal sizes give equal bits. Another M may have
    another order. Raises CertificateFailed for another dtype, for sizes without an offer, and for the library's errors.
    """

    def __init__(self, rows: int, n: int, k: int, dtype: torch.dtype, into: torch.dtype):
        super().__init__(dtype, a=_OP_N, b=_OP_T)
        # Column-major, as the library sees it: out [K, N] = x [K, M] @ grad [N, M]^T.
        self._x, self._grad, self._out = self._layout(k, rows), self._layout(n, rows), self._layout(k, n, _number(into))
        offered = self._ask(self._x, self._grad, self._out)
        if not offered:
            raise CertificateFailed(f"cublaslt: no weight gradient for M={rows} N={n} K={k}, {dtype} into {into}")
        self._algorithm = offered[0][0]
        library, layouts = self._library, (self._x, self._grad, self._out)
        weakref.finalize(self, _free, library, self._desc, self._preference, layouts).atexit = False

    def __call__(self, grad: int, x: int, out: int, beta: float, stream: int) -> None:
        """Enqueue the product on `stream`. grad, x and out are device addresses; stream is a CUDA stream's."""
        first, second, into = (x, self._x), (grad, self._grad), (out, self._out)
        self._enqueue(first, second, into, self._algorithm, byref(c_float(beta)), stream)


def _free(library, desc: c_void_p, preference: c_void_p, layouts: tuple[c_void_p, ...]) -> None:
    """Free what a product holds in the library's memory. Calls that are enqueued already do not need it."""
    library.cublasLtMatmulDescDestroy(desc)
    library.cublasLtMatmulPreferenceDestroy(preference)
    for layout in layouts:
        library.cublasLtMatrixLayoutDestroy(layout)


def _number(dtype: torch.dtype) -> int:
    """The library's number of a dtype. Raises CertificateFailed for another dtype than bf16, fp16 and fp32."""
    name = str(dtype).removeprefix("torch.")
    if name not in _TYPES:
        raise CertificateFailed(f"cublaslt: no GEMM for {dtype}")
    return _TYPES[name]


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
