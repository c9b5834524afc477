"""Routes of unquantized linears on CUDA: cuBLASLt without split-K where certified, else the bundled Triton GEMM.

Order: ascending K, one pass, one fp32 accumulator, bias added in fp32 before rounding (kernels/triton/gemm.py).

A certificate covers one (N, K, dtype, bias) for every number of rows M up to a limit. bi_patch asks the library
(cublaslt) for its algorithms for each M up to 1024 and every seventh M above, and times them at a few M. A kind of
algorithm is compared if it is the fastest for some M (cublaslt_choice) or the library's first offer for some M. The
comparison with the bundled reference is bitwise, at the first, a middle and the last such M.

When serving, an M gets the fastest offer among the kinds that passed. A kind that differed at any M, or that was never
compared, does not serve. The bundled kernel serves an M without a certified offer, and every M past the limit. Times
therefore change only the speed: another choice gives the same bits.

Rounding to 16 bits hides most other orders: on plain random data, one output in thousands shows another order. So half
of the compared sums are exactly zero. Their outputs are only rounding errors, which depend on the order of the sum. The
other half are sums of plain random data, which show where a kernel rounds and where it adds the bias.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bi_patch.errors import CertificateFailed
from bi_patch.ops import bits, certificates
from bi_patch.ops.certificates import Certificate, Evidence, Key
from bi_patch.ops.cuda import cublaslt, cublaslt_choice, machine, timing
from bi_patch.ops.cuda.ahead import Ahead
from bi_patch.ops.registration import define
from bi_patch.ops.zero_sums import cancelling

if TYPE_CHECKING:
    import torch

OPERATION = "cuda.linear"
DATA = "sums of zero and others, algorithms by time"
VENDOR = "cublaslt"
# A certificate's inputs and outputs use at most this share of the free memory, which limits the M that it covers.
_MEMORY_SHARE = 0.3
# Up to this many rows are compared at two positions of the input. More rows include many positions anyway.
TWICE = 2048
# The library is asked for every M up to _EACH, then for every seventh M. 7 divides no alignment that a choice may have.
_EACH, _STEP = 1024, 7
# A timed graph holds enough calls to take about _TIMED_US microseconds, but at most _CALLS. It is replayed _REPLAYS
# times.
_TIMED_US, _CALLS, _REPLAYS = 150, 128, 3
# If the first offer takes longer than this, in microseconds, it serves: timing the others would take seconds.
_SLOW_US = 2000


class Problem(NamedTuple):
    """One linear: y [M, n] = x [M, k] @ weight [n, k].T + bias."""

    n: int
    k: int
    dtype: torch.dtype
    bias: bool

    def __str__(self) -> str:
        return f"N={self.n} K={self.k} {machine.name(self.dtype)}{' bias' if self.bias else ''}"


@dataclass
class Route:
    """Which kernel serves which numbers of rows M of one problem.

    kinds: the kinds of the vendor's algorithms that may serve. limit: the largest M that the vendor may serve.
    tiles_agree: whether all bundled variants give equal bits, so that the fastest may serve each M; else the reference
    variant serves. gemm: the vendor's GEMM, None if no kind passed. preferred: the vendor's fastest kind, by timed M.
    """

    kinds: frozenset[cublaslt.Kind]
    limit: int
    tiles_agree: bool
    gemm: cublaslt.Gemm | cublaslt.ScaledGemm | None
    preferred: Mapping[int, cublaslt.Kind] = field(default_factory=dict)
    _chosen: dict[int, cublaslt.Algorithm | None] = field(default_factory=dict, repr=False)

    def algorithm(self, rows: int) -> cublaslt.Algorithm | None:
        """The vendor's certified algorithm for a number of rows, or None if the bundled kernel serves."""
        if self.gemm is None or rows > self.limit:
            return None
        try:
            return self._chosen[rows]
        except KeyError:
            offers = self.gemm.offers(rows)
            algorithm = cublaslt_choice.choose(rows, offers, self.preferred, self.kinds.__contains__)
            self._chosen[rows] = algorithm
            return algorithm


_routes: dict[Problem, Route] = {}
# What the library offers for each M of asked_rows, by the limit of M. `rehearse` fills it, and `certify` empties it.
_asked: dict[tuple[Problem, int], dict[int, list[cublaslt.Algorithm]]] = {}
_TYPES = ("bfloat16", "float16", "float32")


def define_op() -> None:
    """Define torch.ops.bi_patch.linear(x, weight, bias). A second call does nothing."""
    define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", linear, "CUDA", _fake)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] @ weight [N, K].T + bias [N] -> [..., N], by the problem's route.

    The bundled reference serves a problem without a route. Raises CertificateFailed for a dtype other than bf16, fp16
    and fp32, and if the dtypes of x and weight differ.
    """
    n, k = weight.shape
    flat = x if x.dim() == 2 else x.reshape(-1, k)
    if not packed(flat, k):
        # Certificates cover aligned, packed rows only: the library may pick another algorithm for another layout.
        flat = flat.new_empty(flat.shape).copy_(flat)
    route = _routes.get((n, k, x.dtype, bias is not None))
    algorithm = route.algorithm(flat.shape[0]) if route is not None else None
    if algorithm is not None and packed(weight, k) and (bias is None or packed(bias, 1)):
        out = _vendor(route.gemm, algorithm, flat, weight, bias)
    else:
        out = bundled(flat, weight, bias, route is not None and route.tiles_agree)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], n)


def packed(tensor, row: int) -> bool:
    """Whether certificates cover a tensor's layout: rows of `row` elements without gaps, at an aligned address."""
    strides = tensor.stride()
    return strides[0] == row and strides[-1] == 1 and not tensor.data_ptr() % cublaslt.ALIGNMENT


def _vendor(gemm: cublaslt.Gemm, algorithm: cublaslt.Algorithm, x, weight, bias, out=None):
    """The library's GEMM with the given algorithm, on packed, aligned tensors."""
    if out is None:
        out = _empty()(x, (x.shape[0], gemm.n))
    stream = machine.stream(x.get_device())
    gemm(algorithm, x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(), stream)
    return out


@functools.cache
def _empty() -> Callable:
    from bi_patch.kernels.triton import launch

    return launch.empty


def _fake(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def bundled(x, weight, bias, tiles_agree: bool, out=None):
    """The bundled GEMM: x [M, K] @ weight [N, K].T + bias [N] -> [M, N], into `out` if given.

    tiles_agree: whether any variant may serve; else only the reference does. Raises CertificateFailed for a dtype
    without a kernel, and if the dtypes of x and weight differ.
    """
    from bi_patch.kernels.triton import gemm

    if machine.name(x.dtype) not in _TYPES or weight.dtype != x.dtype:
        raise CertificateFailed(f"linear: no invariant GEMM for {x.dtype} rows and {weight.dtype} weights")
    if weight.stride(-1) != 1:
        weight = weight.contiguous()
    size = x.element_size()
    if not tiles_agree:
        return gemm.gemm(x, weight, bias, _reference_tile(size), out)
    return gemm.product(x, weight, bias, _parts(x, weight), out)


def _parts(x, weight):
    """The bundled variants for these tensors, one for each range of columns."""
    from bi_patch.kernels.triton import gemm

    size = x.element_size()
    descriptors = machine.vendor_allowed() and gemm.can_describe(x) and gemm.can_describe(weight)
    descriptors = descriptors and weight.shape[0] * size % 16 == 0
    return gemm.choose(x.shape[0], *weight.shape, size, machine.shared_memory(), machine.processors(), descriptors)


def _reference_tile(size: int):
    from bi_patch.kernels.triton import gemm

    return gemm.fit(gemm.REFERENCE if size == 2 else gemm.REFERENCE_FP32, size, machine.shared_memory())


def certify(problems: Iterable[Problem], max_rows: int, cache: Path) -> list[Certificate]:
    """Certify each problem for all M up to max_rows, or read its certificate from `cache`, and set up its route.

    Call this before any graph is captured. Returns one certificate per distinct problem, failed certificates included.
    """
    made = []
    for problem in dict.fromkeys(problems):
        key = _key(problem, max_rows)
        try:
            certificate = certificates.obtain(
                cache, key, lambda p=problem, k=key: compare(lambda: Trial(p, max_rows), k), instead="the bundled GEMM"
            )
        finally:
            _asked.pop((problem, max_rows), None)  # unused where the memory allows a smaller M only
        _routes[problem] = route(certificate, cublaslt.Gemm(*problem) if certificate.algorithms else None)
        made.append(certificate)
    return made


def route(certificate: Certificate, gemm: cublaslt.Gemm | cublaslt.ScaledGemm | None) -> Route:
    """The route that a certificate allows. gemm: the vendor's GEMM, None if no kind passed."""
    kinds = frozenset(cublaslt.Kind(*kind) for kind in certificate.algorithms)
    preferred = {m: cublaslt.Kind(*kind) for m, kind in certificate.preferred.items()}
    limit = max(certificate.evidence.rows, default=0)
    return Route(kinds, limit, certificate.route.endswith("+tiles"), gemm, preferred)


def rehearse(problem: Problem, max_rows: int, cache: Path, ahead: Ahead) -> None:
    """Compile ahead what `certify` will launch, and ask the library for its algorithms meanwhile.

    Does nothing if `cache` has the certificate.
    """
    if certificates.load(cache, _key(problem, max_rows)) is not None:
        return
    ahead.rehearse(lambda: _rehearse(problem, max_rows))
    if machine.vendor_allowed():
        ahead.work(lambda: _ask(problem, max_rows))


def _ask(problem: Problem, max_rows: int) -> None:
    gemm = cublaslt.Gemm(*problem)
    _asked[problem, max_rows] = {m: gemm.offers(m) for m in asked_rows(max_rows)}


def _rehearse(problem: Problem, max_rows: int) -> None:
    import torch

    n, k, dtype, bias = problem
    # A kernel's form depends on no contents, so these tensors have none.
    x, weight = (torch.empty((rows, k), dtype=dtype, device="meta") for rows in (max_rows, n))
    added = torch.empty(n, dtype=dtype, device="meta") if bias else None
    bundled(x, weight, added, False)
    if not machine.vendor_allowed():
        for m in _of_each_variant(x, weight):
            bundled(x[:m], weight, added, True)


def _of_each_variant(x, weight) -> Iterable[int]:
    """For each choice of bundled variants, an M that takes it."""
    return {tuple(p.tile for p in _parts(x[:m], weight)): m for m in asked_rows(x.shape[0])}.values()


def routes() -> dict[Problem, Route]:
    """The routes of this process, by problem."""
    return dict(_routes)


def _key(problem: Problem, max_rows: int) -> Key:
    return Key(
        OPERATION, f"{problem} M<={max_rows}", machine.device(), machine.libraries(), machine.kernels_digest(), DATA
    )


def asked_rows(limit: int) -> list[int]:
    """The M for which the library is asked for its algorithms, ascending, up to and including `limit`."""
    each, some = range(1, min(limit, _EACH) + 1), range(_EACH, limit, _STEP)
    return sorted({*each, *some, *cublaslt_choice.timed_rows(limit)})


def compare(make: Callable[[], Trial], key: Key) -> Certificate:
    """The certificate of the trial that `make` makes: the vendor's kinds, and if none passes the bundled variants."""
    import torch

    start = time.perf_counter()
    trial = make()
    n = trial.problem.n
    offers = trial.offers() if machine.vendor_allowed() else {}
    times = trial.times(offers)
    preferred = cublaslt_choice.prefer(offers, times)
    found = cublaslt_choice.compare(offers, preferred, trial.vendor_differs)
    good = {kind for kind, wrong in found.items() if not any(wrong.values())}
    tested = [(kind, m) for kind, wrong in found.items() for m in wrong]
    differing = sum(sum(wrong.values()) for wrong in found.values())
    first = "" if found else f"{VENDOR} has no algorithm that may be certified here"
    if differing:
        kind, m = next((kind, m) for kind, m in tested if found[kind][m])
        first = f"M={m}: {found[kind][m]} outputs of algorithm {tuple(kind)} differ from the bundled GEMM"
    # Compiling every variant takes seconds, so the variants are compared only if they will serve.
    agree = (differing > 0 or not found or trial.mixed) and trial.tiles_agree()
    del trial
    torch.cuda.empty_cache()
    return Certificate(
        key=key,
        route=f"{VENDOR}{'+tiles' if agree else ''}",
        passed=differing == 0 and bool(found),
        passed_rows=sorted({m for _, m in tested} - {m for kind, m in tested if kind not in good}),
        evidence=Evidence(
            rows=sorted({m for _, m in tested}),
            compared=sum((2 if m <= TWICE else 1) * m * n for _, m in tested),
            differing=differing,
            first=first,
        ),
        seconds=round(time.perf_counter() - start, 3),
        made=certificates.today(),
        microseconds={
            "first offer": {str(m): round(us[0], 2) for m, us in times.items()},
            "fastest offer": {str(m): round(min(us), 2) for m, us in times.items()},
        },
        algorithms=sorted(list(kind) for kind in good),
        preferred={m: list(kind) for m, kind in preferred.items()},
    )


class Trial:
    """Random data for one problem, the reference's output, and the comparisons with this output.

    mixed: the bundled kernel serves some M in any case.
    """

    mixed = False

    def __init__(self, problem: Problem, max_rows: int):
        import torch

        self.problem = problem
        self.n, self.k, dtype, bias = problem
        size = dtype.itemsize
        free, _ = torch.cuda.mem_get_info()
        limit = int(free * _MEMORY_SHARE / size) - self.n * self.k
        # The input, the reference and one output at a time.
        self.rows = max(1, min(max_rows, limit // (self.k + 2 * self.n)))
        # How many more copies of the weight fit into the memory.
        self.copies = (limit - self.rows * (self.k + 2 * self.n)) // (self.n * self.k)
        generator = torch.Generator("cuda").manual_seed(self.n * 1_000_003 + self.k)
        order = torch.randperm(self.k, generator=generator, device="cuda")
        self.x = cancelling(self.rows, order, 1, generator, dtype)
        self.weight = cancelling(self.n, order, -1, generator, dtype)
        self.weight[1::2].abs_().mul_(0.125)  # sums that are not zero, small enough for fp16
        self.bias = None
        if bias:
            self.bias = torch.randn(self.n, generator=generator, device="cuda", dtype=dtype)
            self.bias[::2] = 0  # a bias would hide the rounding left of a sum
        self.gemm = cublaslt.Gemm(*problem)
        self.out = torch.empty((self.rows, self.n), dtype=dtype, device="cuda")
        self.want = bundled(self.x, self.weight, self.bias, False)
        if not bool(torch.isfinite(self.want).all()):
            raise ArithmeticError("the bundled GEMM gives values that are not finite")

    def asked(self) -> list[int]:
        """The M for which the library is asked, ascending."""
        return asked_rows(self.rows)

    def offers(self) -> dict[int, list[cublaslt.Algorithm]]:
        """The library's algorithms by M, for each M of `asked`, ascending."""
        held = _asked.pop((self.problem, self.rows), None)
        if held is not None:
            return held
        asked = self.asked()
        # The library computes its answer on the host, without Python's lock.
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            return dict(zip(asked, pool.map(self.gemm.offers, asked), strict=True))

    def times(self, offers: Mapping[int, list[cublaslt.Algorithm]]) -> dict[int, list[float]]:
        """Microseconds of each offer, by M, for M with several offers; up to the first M at which a call is too slow.

        Each call takes the next of several copies of the weight. The copies together exceed the L2 cache, because a
        model reads its weights from memory. Returns {} if the copies do not fit into the memory.
        """
        more = min(2 * machine.cache_bytes() // self.weight.nbytes, _CALLS - 1)
        if not offers or more > self.copies:
            return {}
        weights = [self.weight, *(self.weight.clone() for _ in range(more))]
        found = {}
        for m in cublaslt_choice.timed_rows(self.rows):
            offered = offers.get(m, [])
            if len(offered) < 2:
                continue
            rows = self.take(0, m)
            one = timing.once(partial(self._run, offered[0], rows, self.weight))
            if one > _SLOW_US:
                break
            rounds = min(math.ceil(_TIMED_US / (max(one, 1.0) * len(weights))), _CALLS // len(weights))
            ways = [[partial(self._run, offer, rows, w) for w in weights * rounds] for offer in offered]
            found[m] = timing.microseconds(ways, _REPLAYS)
        return found

    def vendor_differs(self, m: int, algorithm: cublaslt.Algorithm) -> int:
        """How many outputs differ from the reference, for the first m rows and, if m is small, also the last m rows."""
        return bits.total(
            bits.count(self._run(algorithm, self.take(at, m), self.weight), self.want[at : at + m])
            for at in ({0, self.rows - m} if m <= TWICE else {0})
        )

    def take(self, at: int, m: int):
        """m rows of the input from row `at` on, packed and aligned."""
        x = self.x[at : at + m]
        return x if x.data_ptr() % cublaslt.ALIGNMENT == 0 else x.clone()

    def _run(self, algorithm: cublaslt.Algorithm, x, weight):
        return _vendor(self.gemm, algorithm, x, weight, self.bias, self.out[: x.shape[0]])

    def tiles_agree(self) -> bool:
        """Whether every bundled variant that `_parts` may choose gives the reference's bits."""
        return not any(
            bits.differing(bundled(self.x[:m], self.weight, self.bias, True), self.want[:m])
            for m in _of_each_variant(self.x, self.weight)
        )
