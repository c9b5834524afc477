"""Routes of linears with packed weights of 4 or 8 bits on CUDA: the fastest kernel for each M, all in one order.

Order: that of 16-bit linears (bi_patch.ops.cuda.linear) for the dequantized weights (kernels/packing.py). Bundled
kernels dequantize in registers: kernels/cuda/packed.cu, packed_lean.cu, packed_few.cu and, on Hopper, packed_wide.cu.
Or the weights are dequantized once a call, and the route of the 16-bit linear serves, with its own certificate.

Of floats e2m1 of 4 bits (NVFP4), the one scale of all weights multiplies the fp32 sum. So the other way is the route
of a linear with such a number (bi_patch.ops.cuda.factored_linear). This route needs cuBLASLt and serves no bias: a
bundled kernel adds the bias to the rounded product. Where this route does not serve, the bundled kernels serve every
number of rows, on GPUs where they can be the fastest (`serves_floats`). No engine starts without a variant.

A certificate compares each variant of the bundled kernels with the bundled GEMM of the dequantized weights, at numbers
of rows up to a limit, and times the variants and the other way. A variant that differs does not serve. A problem
without a route takes the other way.

Rounding to 16 bits hides most other orders, so half of the compared sums are exactly zero, as for 16-bit linears.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bi_patch.errors import CertificateFailed
from bi_patch.ops import bits as compare_bits
from bi_patch.ops import certificates
from bi_patch.ops.certificates import Certificate, Evidence, Key
from bi_patch.ops.cuda import cublaslt_choice, factored_linear, linear, machine, timing
from bi_patch.ops.cuda.ahead import Ahead
from bi_patch.ops.registration import define
from bi_patch.ops.zero_sums import cancelling

if TYPE_CHECKING:
    import torch

    from bi_patch.kernels.packing import Packed

_log = logging.getLogger("vllm.bi_patch")
OPERATION = "cuda.packed_linear"
DATA = "sums of zero and others, kernels by time"
DATA_OF_FLOATS = f"{DATA}, dequantized weights too"  # where factored_linear may serve
_TYPES = ("bfloat16", "float16")
_MOST = 2048  # rows: above, dequantizing takes a small part of the time
_TIMED = (24, 48, 96)  # rows at which ways are timed besides those of 16-bit linears
_POWER = 0.25  # the one scale of the compared floats e2m1
_WHOLE = -1  # in a certificate, the number of the way that dequantizes all weights
# Variants are compared at these numbers of rows, at the beginning and the end of the input.
_COMPARED = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 255, 256, 257, 500, 512)
_COMPARED += (513, 1000, 1024, 1025, 1500, 2047, 2048)


class Problem(NamedTuple):
    """One linear: y [M, n] = x [M, k] @ w [n, k].T + bias, w from integers of `bits` bits.

    dtype: of x, y, bias and the scales. group: elements of K that share a scale. zeros: whether there are zero points.
    floats: weights are floats e2m1, with scales of one byte, in place of integers.
    """

    n: int
    k: int
    dtype: torch.dtype
    bias: bool
    bits: int
    group: int
    zeros: bool
    floats: bool = False

    def __str__(self) -> str:
        kind = "e2m1" if self.floats else f"int{self.bits}"
        said = f"N={self.n} K={self.k} {kind} groups of {self.group}{' zero points' if self.zeros else ''}"
        return f"{said} {machine.name(self.dtype)}{' bias' if self.bias else ''}"

    def dequantized(self) -> linear.Problem | factored_linear.Problem | None:
        """The 16-bit linear of the same weights, which needs a certificate, too. None: there is none."""
        if self.floats:
            return None if self.bias else factored_linear.Problem(self.n, self.k, self.dtype)
        return linear.Problem(self.n, self.k, self.dtype, self.bias)


@dataclass
class Route:
    """Which way serves which numbers of rows: preferred has the fastest, by timed M, as the number of a variant. whole:
    whether the weights may always be dequantized; else the way of the most timed rows serves more rows, too. variants:
    the fastest variant by timed M, where weights that could be dequantized are not."""

    able: frozenset[int]
    preferred: Mapping[int, int]
    whole: bool = True
    variants: Mapping[int, int] = field(default_factory=dict)
    _chosen: dict[int, int | None] = field(default_factory=dict, repr=False)

    def variant(self, rows: int) -> int | None:
        """The number of the variant that serves a number of rows, or None if the weights are dequantized."""
        if rows not in self._chosen:
            self._chosen[rows] = self._of(self.preferred, rows)
        return self._chosen[rows]

    def instead(self, rows: int) -> int | None:
        """The number of the variant that serves a number of rows whose weights cannot be dequantized. None: none."""
        return self._of(self.variants, rows)

    def _of(self, ways: Mapping[int, int], rows: int) -> int | None:
        above = min((m for m in ways if m >= rows), default=None)
        if above is None and not self.whole:
            above = max(ways, default=None)
        number = _WHOLE if above is None else ways[above]
        return number if number in self.able else None


_routes: dict[Problem, Route] = {}


def define_op() -> None:
    """Define torch.ops.bi_patch.packed_linear. A second call does nothing."""
    define(
        "packed_linear(Tensor x, Tensor data, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group, "
        "Tensor? whole) -> Tensor",
        packed_linear,
        "CUDA",
        lambda x, data, scale, zero, bias, bits, group, whole: x.new_empty((*x.shape[:-1], scale.shape[1])),
    )


def packed_linear(x, data, scale, zero, bias, bits: int, group: int, whole=None) -> torch.Tensor:
    """x [..., K] @ w [N, K].T + bias [N] -> [..., N], by the problem's route. data, scale, zero, bits, group, whole:
    see kernels/packing.Packed. Raises CertificateFailed for another dtype than bf16 and fp16, if the types of x and of
    integers' scales differ, or if floats e2m1 have no route."""
    import torch

    from bi_patch.kernels.packing import Packed

    floats = whole is not None
    if machine.name(x.dtype) not in _TYPES or scale.dtype != (torch.uint8 if floats else x.dtype):
        raise CertificateFailed(f"packed_linear: no invariant GEMM for {x.dtype} rows and scales of {scale.dtype}")
    packed = Packed(data, scale, zero, bits, group, whole)
    n, k = packed.shape
    flat = x.reshape(-1, k)
    if not linear.packed(flat, k):
        flat = flat.clone(memory_format=torch.contiguous_format)
    problem = Problem(n, k, x.dtype, bias is not None, bits, group, zero is not None, floats)
    route = _routes.get(problem)
    number = route.variant(flat.shape[0]) if route is not None else None
    if number is None and floats and (route is None or not _multiplies(problem, flat.shape[0])):
        number = route.instead(flat.shape[0]) if route is not None else None
        if number is None:
            raise CertificateFailed(f"{OPERATION}: {problem} has no certificate")
    if number is not None:
        out = _product(number, flat, packed, bias)
    else:
        out = _whole(flat, packed, bias)
    return out.view(*x.shape[:-1], n)


def _multiplies(problem: Problem, rows: int) -> bool:
    """Whether the route of a problem's dequantized floats e2m1 serves a number of rows. `certify` compares its bits."""
    other = problem.dequantized()
    return problem.floats and other is not None and factored_linear.serves(other, rows)


def _whole(x, packed: Packed, bias):
    """The product by dequantizing all weights."""
    if packed.floats:
        return factored_linear.product(x, dequantize(packed), packed.whole)
    return linear.linear(x, dequantize(packed), bias)


def serves_floats() -> bool:
    """Whether this device runs a variant of each number of rows for floats e2m1."""
    import torch

    from bi_patch.kernels.cuda import packed

    capability = torch.cuda.get_device_capability()
    return any(form.wide and form.bits == 4 and form.runs_on(capability) for form in packed.FORMS)


def runnable(problem: Problem) -> list[int]:
    """The numbers of the variants that this device can run."""
    import torch

    from bi_patch.kernels.cuda import packed

    capability, shared = torch.cuda.get_device_capability(), machine.shared_memory()
    able = (form.runs_on(capability) and _fits(form, problem, shared) for form in packed.FORMS)
    return [number for number, fits in enumerate(able) if fits]


def _fits(form, problem: Problem, shared: int) -> bool:
    from bi_patch.kernels.cuda import packed

    fits = packed.fits(form, problem.group, problem.zeros, shared, floats=problem.floats)
    return fits and form.bits == problem.bits


def _product(number: int, x, packed: Packed, bias):
    """The bundled kernel's product by one variant."""
    from bi_patch.kernels.cuda.packed import FORMS, product

    return product(x, packed, bias, FORMS[number])


def dequantize(packed: Packed):
    """The weights w [N, K] of kernels/packing.py in the type of their scales, of floats e2m1 in bf16."""
    from bi_patch.kernels.cuda.packed import dequantize as unpack

    return unpack(packed)


def routes() -> dict[Problem, Route]:
    """The routes of this process, by problem."""
    return dict(_routes)


def certify(problems: Iterable[Problem], max_rows: int, cache: Path) -> list[Certificate]:
    """Certify each problem for all M up to max_rows, or read its certificate from `cache`, and set up its route.

    Call this before any graph is captured, and after the certificates of the problems' dequantized linears. Returns one
    certificate per distinct problem, failed certificates included. Raises CertificateFailed if no variant is left for
    floats e2m1.
    """
    from bi_patch.kernels.cuda import nvrtc

    nvrtc.folder = cache / "cubins"
    made = []
    for problem in dict.fromkeys(problems):
        key = _key(problem, max_rows)
        instead = "what is left of its variants" if problem.floats else "the GEMM of dequantized weights"
        certificate = certificates.obtain(
            cache, key, lambda p=problem, k=key: _certify(p, k, max_rows), instead=instead
        )
        able = frozenset(number for (number,) in certificate.algorithms)
        preferred = {m: numbers[0] for m, numbers in certificate.preferred.items()}
        variants = {m: numbers[-1] for m, numbers in certificate.preferred.items()} if problem.floats else {}
        if problem.floats and not preferred:
            certificates.require([certificate])
        _routes[problem] = Route(able, preferred, not problem.floats, variants)
        made.append(certificate)
    return made


def rehearse(problem: Problem, max_rows: int, cache: Path, ahead: Ahead) -> None:
    """Compile ahead what `certify` will launch. Does nothing if `cache` has the certificate."""
    if certificates.load(cache, _key(problem, max_rows)) is not None:
        return
    import torch

    from bi_patch.kernels.cuda import nvrtc, packed

    nvrtc.folder = cache / "cubins"
    device = torch.cuda.current_device()
    for number in runnable(problem):
        form = packed.FORMS[number]
        given = problem.group, problem.zeros, problem.dtype, device, False, problem.floats
        ahead.work(lambda f=form, g=given: packed.prepare(f, *g))
    if problem.floats:
        ahead.rehearse(lambda: rehearse_reference(problem, min(max_rows, _MOST)))


def rehearse_reference(problem: Problem, rows: int) -> None:
    """For Ahead.rehearse: the bundled GEMM that a certificate compares with, for so many rows."""
    import torch

    x, weight = (torch.empty((m, problem.k), dtype=problem.dtype, device="meta") for m in (rows, problem.n))
    bias = torch.empty(problem.n, dtype=problem.dtype, device="meta") if problem.bias else None
    linear.bundled(x, weight, bias, False)


def _key(problem: Problem, max_rows: int) -> Key:
    said = f"{problem} M<={max_rows}"
    data = DATA_OF_FLOATS if problem.floats and problem.dequantized() is not None else DATA
    return Key(OPERATION, said, machine.device(), machine.libraries(), machine.kernels_digests(), data)


def _certify(problem: Problem, key: Key, max_rows: int) -> Certificate:
    import torch

    from bi_patch.kernels.cuda.packed import FORMS as known

    start = time.perf_counter()
    trial = _Trial(problem, min(max_rows, _MOST))
    wrong: dict[int, dict[int, int]] = {}
    for number in runnable(problem):
        serves = known[number].serves
        wrong[number] = {m: trial.differs(number, m) for m in _COMPARED if m <= trial.rows and serves(m)}
    if problem.floats:  # of integers, this product is what the variants are compared with
        wrong[_WHOLE] = {m: trial.differs(_WHOLE, m) for m in _COMPARED if m <= trial.rows and _multiplies(problem, m)}
    wrong = {number: found for number, found in wrong.items() if found}
    good = [number for number, found in wrong.items() if not any(found.values())]
    preferred, times = trial.fastest(good)
    differing = sum(sum(found.values()) for found in wrong.values())
    first = next(
        (
            f"M={m}: {count} outputs of {'the library' if number == _WHOLE else known[number]} differ from the GEMM of "
            "dequantized weights"
            for number, found in wrong.items()
            for m, count in found.items()
            if count
        ),
        "",
    )
    rows = sorted({m for found in wrong.values() for m in found})
    bad = {m for found in wrong.values() if any(found.values()) for m in found}
    del trial
    torch.cuda.empty_cache()
    return Certificate(
        key=key,
        route="bundled",
        passed=any(number != _WHOLE for number in good) and not differing,
        passed_rows=[m for m in rows if m not in bad],
        evidence=Evidence(
            rows=rows,
            compared=sum(2 * m * problem.n for found in wrong.values() for m in found),
            differing=differing,
            first=first,
        ),
        seconds=round(time.perf_counter() - start, 3),
        made=certificates.today(),
        microseconds={"served": {str(m): round(us, 2) for m, us in times.items()}},
        algorithms=[[number] for number in sorted(good) if number != _WHOLE],
        preferred={m: list(numbers) for m, numbers in preferred.items()},
    )


def drawn(problem: Problem, order: torch.Tensor, generator: torch.Generator):
    """Random packed weights, and a bias or None. With rows that zero_sums.cancelling makes of the same order and sign
    1, half of the sums are exactly zero.

    order: a permutation of the K columns, int64, on the generator's device.
    """
    import torch

    from bi_patch.kernels.packing import pack, pack_floats

    n, k, dtype, _, bits, group, zeros, floats = problem
    device = generator.device
    most = 2 ** (bits - 1) - 1 if not zeros else 2 ** (bits - 2)
    half = torch.randint(-most, most + 1, (n, k // 2), generator=generator, device=device, dtype=torch.int16)
    value = torch.cat((half, -half), 1)[:, order]  # pairs that cancel where the scale is one for a row
    value[1::2].abs_()
    scale = torch.rand((n, k // group), generator=generator, device=device) * 0.01 + 0.002
    scale[::2] = scale[::2, :1]
    if floats:
        codes = (value.abs() | (value < 0).to(torch.int16) * 8).to(torch.uint8)
        packed = pack_floats(codes, (scale * 32).to(torch.float8_e4m3fn), torch.tensor(_POWER, device=device))
    else:
        zero = None
        if zeros:
            zero = torch.randint(most, 2**bits - most, (n, k // group), generator=generator, device=device)
        middle = 2 ** (bits - 1) if zero is None else zero.to(torch.int16).repeat_interleave(group, 1)
        packed = pack((value + middle).to(torch.uint8), scale.to(dtype), zero, bits)
    return packed, drawn_bias(problem, generator)


def drawn_bias(problem: Problem, generator: torch.Generator):
    """A random bias [N] for weights as `drawn` makes them, or None."""
    import torch

    if not problem.bias:
        return None
    added = torch.randn(problem.n, generator=generator, device=generator.device, dtype=problem.dtype)
    added[::2] = 0  # a bias would hide the rounding left of a sum
    return added


class _Trial:
    """Random data for one problem, the reference's output, and the comparisons with this output."""

    def __init__(self, problem: Problem, rows: int):
        import torch

        self.problem, self.rows = problem, rows
        n, k, dtype, *_ = problem
        generator = torch.Generator("cuda").manual_seed(n * 1_000_003 + k)
        order = torch.randperm(k, generator=generator, device="cuda")
        self.x = cancelling(rows, order, 1, generator, dtype)
        self.packed, self.bias = drawn(problem, order, generator)
        weights = dequantize(self.packed)
        if problem.floats:
            weights *= self.packed.whole  # a power of two, so these weights are as exact as their products
        self.want = linear.bundled(self.x, weights, self.bias, False)
        if not bool(torch.isfinite(self.want).all()):
            raise ArithmeticError("the bundled GEMM gives values that are not finite")

    def differs(self, number: int, m: int) -> int:
        """How many outputs of a variant differ from the reference, for the first m rows and for the last m rows. All,
        if the variant does not run."""
        try:
            return sum(
                compare_bits.differing(self._run(number, self._take(at, m), self.packed), self.want[at : at + m])
                for at in (0, self.rows - m)
            )
        except Exception:
            _log.debug("bi_patch: %s: no variant %s", self.problem, number, exc_info=True)
            return 2 * m * self.problem.n

    def _take(self, at: int, m: int):
        x = self.x[at : at + m]
        return x if linear.packed(x, self.problem.k) else x.clone()

    def _run(self, number: int, x, packed):
        if number == _WHOLE:
            return _whole(x, packed, self.bias)
        return _product(number, x, packed, self.bias)

    def fastest(self, good: list[int]) -> tuple[dict[int, tuple[int, ...]], dict[int, float]]:
        """The fastest way at each timed number of rows, and its microseconds. Of floats e2m1 that may be dequantized,
        the fastest variant, too: a pair."""
        from bi_patch.kernels.cuda.packed import FORMS as known

        more = 2 * machine.cache_bytes() // self.packed.data.nbytes
        packs = [self.packed, *(self.packed._replace(data=self.packed.data.clone()) for _ in range(min(more, 47)))]
        preferred, times = {}, {}
        for m in sorted({*cublaslt_choice.timed_rows(self.rows), *(m for m in _TIMED if m < self.rows)}):
            x = self._take(0, m)
            ways = [number for number in good if number != _WHOLE and known[number].serves(m)]
            count = len(ways)
            if self.problem.floats and not ways:
                continue
            may = _WHOLE in good and _multiplies(self.problem, m) if self.problem.floats else m > 16
            ways += [_WHOLE] if may else []
            if not ways:
                continue
            us = timing.microseconds([[partial(self._run, way, x, p) for p in packs] for way in ways], 3)
            best = min(range(len(us)), key=us.__getitem__)
            preferred[m], times[m] = (ways[best],), us[best]
            if self.problem.floats and self.problem.dequantized() is not None:
                preferred[m] += (ways[min(range(count), key=us.__getitem__)],)
        return preferred, times
