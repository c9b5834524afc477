"""Routes of unquantized linears on CUDA: cuBLASLt without split-K where certified, else the bundled Triton GEMM.

Order: ascending K, one pass, one fp32 accumulator, bias added in fp32 before rounding (kernels/triton/gemm.py).
A certificate covers one (N, K, dtype, bias) for every M up to a limit. The library (cublaslt) is asked for its
algorithm for each M up to 1024 and every seventh above; each kind of algorithm that it names runs against the bundled
reference, bitwise, at its first, a middle and its last M. When serving, an M whose algorithm is of a kind that passed
gets it; a kind that differed anywhere or was never seen, and every M past the limit, gets the bundled kernel.

Rounding to 16 bits hides most other orders: on plain random data one output in thousands shows one. So half of the sums
that are compared are exactly zero: what comes out is what their order left, and another order leaves something else.
The other half are plain, and show where the result was rounded and the bias added.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bi_patch.errors import CertificateFailed
from bi_patch.orders import certificates, cublaslt, cuda
from bi_patch.orders.certificates import Certificate, Evidence, Key
from bi_patch.orders.zero_sums import cancelling

if TYPE_CHECKING:
    import torch

OPERATION = "cuda.linear"
DATA = "sums of zero and others"
VENDOR = "cublaslt"
# At most this share of free memory is used for inputs and outputs of a certificate; it bounds the M that is covered.
_MEMORY_SHARE = 0.3
# Up to this many rows are compared at two positions of the input; more rows hold many positions themselves.
_TWICE = 2048
# The library is asked for every M up to here, then for every seventh: prime to all that a choice may be aligned to.
_EACH, _STEP = 1024, 7
_log = logging.getLogger("vllm.bi_patch")


class Problem(NamedTuple):
    """One linear: y [M, n] = x [M, k] @ weight [n, k].T + bias."""

    n: int
    k: int
    dtype: torch.dtype
    bias: bool

    def __str__(self) -> str:
        return f"N={self.n} K={self.k} {cuda.name(self.dtype)}{' bias' if self.bias else ''}"


@dataclass
class Route:
    """The kinds of the vendor's algorithms that may serve up to `limit` rows; None of them: the bundled kernel.

    tiles_agree: the bundled variants give equal bits here, so the fastest may serve each M; else the reference does.
    """

    kinds: frozenset[cublaslt.Kind]
    limit: int
    tiles_agree: bool
    gemm: cublaslt.Gemm | None
    _plans: dict[int, cublaslt.Plan | None] = field(default_factory=dict, repr=False)

    def plan(self, rows: int) -> cublaslt.Plan | None:
        """The vendor's algorithm for a number of rows, where it is certified."""
        try:
            return self._plans[rows]
        except KeyError:
            asked = self.gemm.plan(rows) if self.gemm is not None and rows <= self.limit else None
            plan = self._plans[rows] = asked if asked is not None and asked.kind in self.kinds else None
            return plan


_routes: dict[Problem, Route] = {}
_defined: list[torch.library.Library] = []
_TYPES = ("bfloat16", "float16", "float32")


def define_op() -> None:
    """Define torch.ops.bi_patch.linear(x, weight, bias), opaque to torch.compile. Idempotent."""
    import torch

    if _defined:
        return
    library = torch.library.Library("bi_patch", "FRAGMENT")
    library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    library.impl("linear", linear, "CUDA")
    library.impl("linear", _fake, "Meta")
    _defined.append(library)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] @ weight [N, K].T + bias [N] -> [..., N], by the certified route. A problem without one is bundled."""
    import torch

    n, k = weight.shape
    flat = x.reshape(-1, k)
    if not _packed(flat, k):
        # Certificates are about aligned, packed rows: another layout may get another algorithm.
        flat = flat.clone(memory_format=torch.contiguous_format)
    rows = flat.shape[0]
    route = _routes.get((n, k, x.dtype, bias is not None))
    plan = route.plan(rows) if route is not None else None
    if plan is not None and _packed(weight, k) and (bias is None or _packed(bias, 1)):
        out = _vendor(route.gemm, plan, flat, weight, bias)
    else:
        out = bundled(flat, weight, bias, route is not None and route.tiles_agree)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], n)


def _packed(tensor, row: int) -> bool:
    return tensor.stride(0) == row and tensor.stride(-1) == 1 and tensor.data_ptr() % cublaslt.ALIGNMENT == 0


def _vendor(gemm: cublaslt.Gemm, plan: cublaslt.Plan, x, weight, bias, out=None):
    """The library's GEMM on packed, aligned tensors, by the algorithm of `plan`."""
    import torch

    if out is None:
        out = torch.empty((x.shape[0], gemm.n), dtype=x.dtype, device=x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    gemm(plan, x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(), stream)
    return out


def _fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def bundled(x, weight, bias, tiles_agree: bool, out=None):
    """The bundled GEMM: x [M, K] @ weight [N, K].T + bias [N] -> [M, N], into `out` where given.

    tiles_agree: any variant may serve, else only the reference. Raises CertificateFailed for a dtype without a kernel.
    """
    from bi_patch.kernels.triton import gemm

    if cuda.name(x.dtype) not in _TYPES or weight.dtype != x.dtype:
        raise CertificateFailed(f"linear: no invariant GEMM for {x.dtype} rows and {weight.dtype} weights")
    if weight.stride(-1) != 1:
        weight = weight.contiguous()
    size = x.element_size()
    if not tiles_agree:
        return gemm.gemm(x, weight, bias, _reference_tile(size), out)
    return gemm.gemm(x, weight, bias, _tile(x, weight), out)


def _tile(x, weight):
    """The bundled variant for these tensors."""
    from bi_patch.kernels.triton import gemm

    size = x.element_size()
    descriptors = cuda.vendor_allowed() and gemm.can_describe(x) and gemm.can_describe(weight)
    descriptors = descriptors and weight.shape[0] * size % 16 == 0
    return gemm.choose(x.shape[0], *weight.shape, size, cuda.shared_memory(), cuda.processors(), descriptors)


def _reference_tile(size: int):
    from bi_patch.kernels.triton import gemm

    return gemm.fit(gemm.REFERENCE if size == 2 else gemm.REFERENCE_FP32, size, cuda.shared_memory())


def certify(problems: Iterable[Problem], max_rows: int, cache: Path) -> list[Certificate]:
    """Give each problem its route for all M up to max_rows, from disk or anew. Call it before any graph is captured.

    Raises CertificateFailed where cuBLASLt cannot be called.
    """
    made = []
    for problem in dict.fromkeys(problems):
        key = _key(problem, max_rows)
        certificate = certificates.obtain(cache, key, lambda p=problem, k=key: _certify(p, k, max_rows))
        kinds = frozenset(cublaslt.Kind(*kind) for kind in certificate.algorithms)
        limit = max(certificate.evidence.rows, default=0)
        gemm = cublaslt.Gemm(*problem) if kinds else None
        _routes[problem] = Route(kinds, limit, certificate.route.endswith("+tiles"), gemm)
        made.append(certificate)
        if not certificate.passed:
            _log.warning("bi_patch: %s: %s", problem, certificate.evidence.first)
    return made


def routes() -> dict[Problem, Route]:
    """The routes of this process."""
    return dict(_routes)


def _key(problem: Problem, max_rows: int) -> Key:
    return Key(OPERATION, f"{problem} M<={max_rows}", cuda.device(), cuda.libraries(), cuda.kernels_digest(), DATA)


def asked_rows(limit: int) -> list[int]:
    """The M, ascending, for which the library is asked for its algorithm; the limit is one of them."""
    return sorted({*range(1, min(limit, _EACH) + 1), *range(_EACH, limit, _STEP), limit})


def _certify(problem: Problem, key: Key, max_rows: int) -> Certificate:
    import torch

    start = time.perf_counter()
    trial = _Trial(problem, max_rows)
    kinds = trial.kinds() if cuda.vendor_allowed() else {}
    passed, good, tested, compared, differing, first = [], [], [], 0, 0, ""
    for kind, rows in kinds.items():
        differs = 0
        some = sorted({rows[0], rows[len(rows) // 2], rows[-1]})
        for m in some:
            wrong = trial.vendor_differs(m)
            tested.append(m)
            compared += (2 if m <= _TWICE else 1) * m * problem.n
            differs += wrong
            if wrong and not first:
                first = f"M={m}: {wrong} outputs of algorithm {tuple(kind)} differ from the bundled GEMM"
        differing += differs
        if not differs:
            passed += some
            good.append(list(kind))
    # Compiling every variant takes seconds: only where they will serve.
    agree = (differing > 0 or not kinds) and trial.tiles_agree()
    del trial
    torch.cuda.empty_cache()
    return Certificate(
        key=key,
        route=f"{VENDOR}{'+tiles' if agree else ''}",
        passed=differing == 0 and bool(kinds),
        passed_rows=sorted(passed),
        algorithms=sorted(good),
        evidence=Evidence(sorted(set(tested)), compared, differing, first),
        seconds=round(time.perf_counter() - start, 3),
        made=certificates.today(),
    )


class _Trial:
    """Random data for one problem, the reference's output, and comparisons with it."""

    def __init__(self, problem: Problem, max_rows: int):
        import torch

        self.n, self.k, dtype, bias = problem
        size = dtype.itemsize
        free, _ = torch.cuda.mem_get_info()
        limit = int(free * _MEMORY_SHARE / size) - self.n * self.k
        # The input, the reference and one output at a time.
        self.rows = max(1, min(max_rows, limit // (self.k + 2 * self.n)))
        generator = torch.Generator("cuda").manual_seed(self.n * 1_000_003 + self.k)
        order = torch.randperm(self.k, generator=generator, device="cuda")
        self.x = cancelling(self.rows, order, 1, generator, dtype)
        self.weight = cancelling(self.n, order, -1, generator, dtype)
        self.weight[1::2].abs_().mul_(0.125)  # their sums are not zero; fp16 holds them
        self.bias = None
        if bias:
            self.bias = torch.randn(self.n, generator=generator, device="cuda", dtype=dtype)
            self.bias[::2] = 0  # it would cover what is left of a sum
        self.gemm = cublaslt.Gemm(*problem)
        self.out = torch.empty((self.rows, self.n), dtype=dtype, device="cuda")
        self.want = bundled(self.x, self.weight, self.bias, False)
        if not bool(torch.isfinite(self.want).all()):
            raise CertificateFailed(f"{OPERATION} {problem}: the bundled GEMM gives values that are not finite")

    def kinds(self) -> dict[cublaslt.Kind, list[int]]:
        """The M that are asked for, by the algorithm that the library has for them; M without one are left out."""
        kinds: dict[cublaslt.Kind, list[int]] = {}
        asked = asked_rows(self.rows)
        # The library answers on the host, outside Python's lock.
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for m, plan in zip(asked, pool.map(self.gemm.plan, asked), strict=True):
                if plan is not None:
                    kinds.setdefault(plan.kind, []).append(m)
        return kinds

    def vendor_differs(self, m: int) -> int:
        """Outputs that differ from the reference for the first m rows and, if few, the last m (another position)."""
        count = 0
        for at in {0, self.rows - m} if m <= _TWICE else {0}:
            x = self.x[at : at + m]
            x = x if x.data_ptr() % cublaslt.ALIGNMENT == 0 else x.clone()
            got = _vendor(self.gemm, self.gemm.plan(m), x, self.weight, self.bias, self.out[:m])
            count += unequal(got, self.want[at : at + m])
        return count

    def tiles_agree(self) -> bool:
        """Whether every bundled variant that can serve gives the reference's bits."""
        most = {_tile(self.x[:m], self.weight): m for m in asked_rows(self.rows)}
        return not any(
            unequal(bundled(self.x[:m], self.weight, self.bias, True), self.want[:m]) for m in most.values()
        )


def unequal(got: torch.Tensor, want: torch.Tensor) -> int:
    """How many elements differ in any bit."""
    import torch

    kind = {2: torch.int16, 4: torch.int32}[got.element_size()]
    if torch.equal(got.view(kind), want.view(kind)):
        return 0
    return int((got.view(kind) != want.view(kind)).sum())
