"""Routes of 16-bit linears whose sum one number multiplies: out[m, n] = round(whole * sum over k of x[m, k] * w[n, k]).

Order: that of bi_patch.ops.cuda.linear up to the fp32 sum. `whole`, one fp32 number in the device's memory, multiplies
the sum in fp32, and the result is rounded once. So these are the bits of the bundled kernels for packed floats e2m1
(bi_patch.ops.cuda.packed_linear) with the same weights. There is no bias: a library may add it in one step with the
product.

cuBLASLt takes `whole` as its alpha. A certificate compares as for 16-bit linears, with two numbers: one that is no
power of two, so that each rounding shows, and one with which half of the results lie below the normal range. The
reference is the bundled GEMM with results in fp32, which PyTorch multiplies and rounds. Where no algorithm is
certified, `serves` is false, and the caller takes the packed weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from bi_patch.errors import CertificateFailed
from bi_patch.ops import bits, certificates
from bi_patch.ops.certificates import Certificate, Key
from bi_patch.ops.cuda import cublaslt, linear, machine
from bi_patch.ops.cuda.ahead import Ahead
from bi_patch.ops.zero_sums import cancelling

if TYPE_CHECKING:
    import torch

OPERATION = "cuda.factored_linear"
DATA = "sums of zero and others, times two numbers, algorithms by time"
LEAST = 17  # rows: for fewer, packed weights are faster, because reading the weights takes the time
_NUMBERS = (0.0123, 1.3e-38)
_AT_ONCE = 2048  # rows of the reference's sums, which are fp32
_MEMORY_SHARE = 0.3  # of the free memory, as for 16-bit linears


class Problem(NamedTuple):
    """One linear: y [M, n] = round(whole * (x [M, k] @ w [n, k].T)). dtype: of x, w and y."""

    n: int
    k: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"N={self.n} K={self.k} {machine.name(self.dtype)} times a number"


_routes: dict[Problem, linear.Route] = {}


def serves(problem: Problem, rows: int) -> bool:
    """Whether an algorithm is certified for a number of rows."""
    route = _routes.get(problem)
    return route is not None and rows >= LEAST and route.algorithm(rows) is not None


def product(x: torch.Tensor, weight: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """round(whole * (x [M, K] @ weight [N, K].T)) -> [M, N]. whole: fp32 [], on the same device.

    x and weight: packed, aligned, of one dtype. Raises CertificateFailed where `serves` is false, and for tensors of
    another layout or type.
    """
    (rows, k), n = x.shape, weight.shape[0]
    problem = Problem(n, k, x.dtype)
    fits = linear.packed(x, k) and linear.packed(weight, k) and weight.dtype == x.dtype
    if not fits or machine.name(whole.dtype) != "float32" or not serves(problem, rows):
        raise CertificateFailed(f"{OPERATION}: {problem} has no certificate for {rows} such rows")
    route = _routes[problem]
    return _vendor(route.gemm, route.algorithm(rows), x, weight, whole)


def _vendor(gemm: cublaslt.FactoredGemm, algorithm: cublaslt.Algorithm, x, weight, whole, out=None):
    """The library's product with the given algorithm, on packed, aligned tensors."""
    if out is None:
        out = x.new_empty((x.shape[0], gemm.n))
    given = (t.data_ptr() for t in (x, weight, whole, out))
    gemm(algorithm, *given, machine.stream(x.get_device()))
    return out


def certify(problems: Iterable[Problem], max_rows: int, cache: Path) -> list[Certificate]:
    """Certify each problem for M from LEAST to max_rows, or read its certificate from `cache`, and set up its route.

    Call this before any graph is captured, and before packed_linear.certify. Returns one certificate per distinct
    problem, failed certificates included.
    """
    made = []
    for problem in dict.fromkeys(problems):
        key = _key(problem, max_rows)
        certificate = certificates.obtain(
            cache, key, lambda p=problem, k=key: _certify(p, k, max_rows), instead="the kernel for packed weights"
        )
        gemm = cublaslt.FactoredGemm(*problem) if certificate.algorithms else None
        _routes[problem] = linear.route(certificate, gemm)
        made.append(certificate)
    return made


def rehearse(problem: Problem, max_rows: int, cache: Path, ahead: Ahead) -> None:
    """Compile ahead what `certify` will launch. Does nothing if `cache` has the certificate."""
    if certificates.load(cache, _key(problem, max_rows)) is None:
        ahead.rehearse(lambda: _rehearse(problem, max_rows))


def _rehearse(problem: Problem, max_rows: int) -> None:
    import torch

    rows = min(max_rows, _AT_ONCE)
    x, weight = (torch.empty((m, problem.k), dtype=problem.dtype, device="meta") for m in (rows, problem.n))
    _sums(x, weight)


def routes() -> dict[Problem, linear.Route]:
    """The routes of this process, by problem."""
    return dict(_routes)


def _key(problem: Problem, max_rows: int) -> Key:
    said = f"{problem} M<={max_rows}"
    return Key(OPERATION, said, machine.device(), machine.libraries(), machine.kernels_digest(), DATA)


def _certify(problem: Problem, key: Key, max_rows: int) -> Certificate:
    made = linear.compare(lambda: _Trial(problem, max_rows), key)
    evidence = msgspec.structs.replace(made.evidence, compared=len(_NUMBERS) * made.evidence.compared)
    return msgspec.structs.replace(made, evidence=evidence)


def _sums(x, weight):
    """The bundled GEMM's fp32 sums [M, N]."""
    import torch

    out = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    return linear.bundled(x, weight, None, False, out)


class _Trial(linear.Trial):
    """Random data for one problem, the reference's output for each number, and the comparisons with these outputs."""

    def __init__(self, problem: Problem, max_rows: int):
        import torch

        self.problem = problem
        self.n, self.k, dtype = n, k, _ = problem
        size = dtype.itemsize
        free, _ = torch.cuda.mem_get_info()
        limit = int(free * _MEMORY_SHARE / size) - n * k - 2 * _AT_ONCE * n * 4 // size
        each = k + (1 + len(_NUMBERS)) * n  # the input, one output, and the references
        self.rows = max(1, min(max_rows, limit // each))
        self.copies = (limit - self.rows * each) // (n * k)
        generator = torch.Generator("cuda").manual_seed(n * 1_000_003 + k)
        order = torch.randperm(k, generator=generator, device="cuda")
        self.x = cancelling(self.rows, order, 1, generator, dtype)
        self.weight = cancelling(n, order, -1, generator, dtype)
        self.weight[1::2].abs_().mul_(0.125)
        self.numbers = [torch.tensor(number, dtype=torch.float32, device="cuda") for number in _NUMBERS]
        self.gemm = cublaslt.FactoredGemm(*problem)
        self.out = torch.empty((self.rows, n), dtype=dtype, device="cuda")
        self.wants = self._references()

    def _references(self) -> list[torch.Tensor]:
        import torch

        wants = [torch.empty_like(self.out) for _ in self.numbers]
        for at in range(0, self.rows, _AT_ONCE):
            sums = _sums(self.x[at : at + _AT_ONCE], self.weight)
            if not bool(torch.isfinite(sums).all()):
                raise ArithmeticError("the bundled GEMM gives values that are not finite")
            for want, number in zip(wants, self.numbers, strict=True):
                want[at : at + _AT_ONCE] = (sums * number).to(want.dtype)
        return wants

    def asked(self) -> list[int]:
        """The M for which the library is asked, ascending."""
        return [m for m in linear.asked_rows(self.rows) if m >= LEAST]

    def vendor_differs(self, m: int, algorithm: cublaslt.Algorithm) -> int:
        """How many outputs differ from the references, as in linear.Trial. The output holds NaN before: a kernel that
        reads the output, which beta = 0 multiplies, differs."""
        counts = []
        for at in sorted({0, self.rows - m} if m <= linear.TWICE else {0}):
            for want, number in zip(self.wants, self.numbers, strict=True):
                self.out[:m].fill_(float("nan"))
                got = _vendor(self.gemm, algorithm, self.take(at, m), self.weight, number, self.out[:m])
                counts.append(bits.count(got, want[at : at + m]))
        return bits.total(counts)

    def _run(self, algorithm, x, weight):
        return _vendor(self.gemm, algorithm, x, weight, self.numbers[0], self.out[: x.shape[0]])

    def tiles_agree(self) -> bool:
        """False: no bundled variant serves here."""
        return False
