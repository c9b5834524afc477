"""Routes of quantized linears on CPU: vLLM's own kernel at certified numbers of rows, else the bundled GEMM.

Order: the library's. Integer sums are exact in every order; where sums are floating-point, the certificate compares
each number of rows M in ROWS with M = 512, bitwise, at several places of data whose sums nearly cancel. The kernel then
sees only these M: fewer rows are filled up with zeros to the next of them, more rows are cut. A row's bits do not
depend on rows beside it, so neither changes a bit, and the kernel serves any number of rows at its own speed.

If the certificate fails, the bundled GEMM serves on the dequantized weight, at a higher cost in memory.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bi_patch.ops import bits, certificates
from bi_patch.ops.certificates import Certificate, Evidence, Key
from bi_patch.ops.cpu import linear, machine
from bi_patch.ops.cpu.numbered import Routes
from bi_patch.ops.registration import define

if TYPE_CHECKING:
    import torch

BASE = 512  # the number of rows that all others are compared with
# Every number of rows of decode steps. Above, an eighth more work at most fills a step up, and long prefills are cut.
ROWS = (
    *range(1, 129),
    *range(144, 257, 16),
    *range(288, BASE + 1, 32),
    *range(BASE + 64, 1025, 64),
    2048,
)
OPERATION = "cpu.quantized"
_PLACES = 8  # up to 64 rows are compared at this many places of the data
_LOST = 32  # rows that may be filled up rather than cut
_SMALL = 32  # the library serves only if it is certified for some number of rows up to this one
_INSTEAD = "the kernel at other numbers of rows, or the bundled GEMM,"

Product = Callable[["torch.Tensor", "torch.Tensor | None"], "torch.Tensor"]  # (x [M, K], bias [N] or None) -> [M, N]


@dataclass
class Quantized:
    """One layer's route. New weights keep it, because compiled code holds its number.

    product: what serves. rows: the row counts M that `product` may see, ascending; () for any M.
    layer: the layer whose parameters `product` reads.
    """

    key: Key
    n: int
    k: int
    product: Product
    rows: tuple[int, ...]
    layer: weakref.ref[torch.nn.Module]
    function: Product | None = None

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        import torch

        flat = x.reshape(-1, self.k)
        m = flat.shape[0]
        if not self.rows or m in self.rows:
            y = self.product(flat, bias)
        else:
            parts = [self._piece(flat[at : at + size], asked, bias) for at, size, asked in pieces(m, self.rows)]
            y = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else x.new_empty(0, self.n)
        return y.view(*x.shape[:-1], self.n)

    def _piece(self, x: torch.Tensor, asked: int, bias: torch.Tensor | None) -> torch.Tensor:
        m = x.shape[0]
        if asked == m:
            return self.product(x, bias)
        full = x.new_zeros(asked, self.k)
        full[:m] = x
        return self.product(full, bias)[:m]


def pieces(m: int, rows: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """Cuts of m rows: (first row, rows, the certified number of rows to fill up to). rows: ascending, not empty."""
    at = 0
    while at < m:
        left = m - at
        above = next((size for size in rows if size >= left), None)
        if above is None or above - left > max(_LOST, left // 8):
            size = max((size for size in rows if BASE <= size <= left), default=0)
            if size:
                yield at, size, size
                at += size
                continue
        size = min(left, above or rows[-1])
        yield at, size, above or rows[-1]
        at += size


_layers: Routes[Quantized] = Routes("bi_patch_quantized", OPERATION, "quantized linear")


def route(
    layer: torch.nn.Module,
    scheme: str,
    vendor: Product,
    weight: Callable[[], torch.Tensor],
    substitute: Callable[[], Product],
    *,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    bias: torch.Tensor | None,
    cache: Path,
    library: str,
) -> Product:
    """Certify one layer; returns its route as a function (x [..., K], bias [N] or None) -> [..., N].

    A layer that has a route keeps its number and its function: only the weights change.
    scheme: what decides the kernel and its order, in words. vendor: the library's kernel on this layer's weights.
    weight: makes the dequantized weight [N, K] in `dtype`, for data whose sums nearly cancel. substitute: makes the
    product that serves if the certificate fails. sizes: N, K. dtype: of x. bias: as `vendor` takes it. cache: the
    folder of certificates and built kernels. library: the vendor's version.
    Raises CertificateFailed if the bundled kernels cannot be built.
    """
    machine.load_kernels(cache)
    n, k = sizes
    asked = key(scheme, n, k, dtype, bias is not None, library)
    held = _layers.of(layer)
    if held is not None and held.key == asked:
        held.product = vendor if held.rows else substitute()
        return held.function
    certificate = certificates.obtain(cache, asked, lambda: _certify(asked, vendor, weight(), bias), instead=_INSTEAD)
    rows = serving(certificate)
    made = Quantized(asked, n, k, vendor if rows else substitute(), rows, weakref.ref(layer))
    made.function = _function(made, _layers.add(layer, made))
    return made.function


def serving(certificate: Certificate) -> tuple[int, ...]:
    """The numbers of rows at which the library's kernel serves, ascending; () if it does not serve."""
    rows = tuple(sorted(certificate.passed_rows))
    return rows if rows and rows[0] <= _SMALL else ()


def _function(made: Quantized, handle: int) -> Product:
    import torch

    _define_op()
    n = made.n
    number = torch.tensor(handle, device="cpu")  # a tensor, because compiled code may serve another engine's model

    def apply(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.bi_patch.cpu_quantized(x, bias, number, n)
        return made(x, bias)

    return apply


def routes(model: torch.nn.Module) -> list[Quantized]:
    """The routes of a model's layers."""
    return _layers.within(model)


def has_route(layer: torch.nn.Module) -> bool:
    """Whether `route` gave this layer a route."""
    return _layers.of(layer) is not None


def scheme(layer: torch.nn.Module) -> str:
    """The scheme of a layer with a route, as it was given to `route`."""
    return _layers.of(layer).key.problem.partition(" N=")[0]


def key(scheme: str, n: int, k: int, dtype: torch.dtype, bias: bool, library: str) -> Key:
    """The key of a quantized linear's certificate."""
    problem = f"{scheme} N={n} K={k} {str(dtype).removeprefix('torch.')}{' bias' if bias else ''}"
    libraries, data = machine.libraries(library), f"{linear.DATA}, {len(ROWS)} numbers of rows"
    data += ", also without the bias" if bias else ""
    return Key(OPERATION, problem, machine.device(), libraries, machine.kernels_digest(), data)


def _certify(asked: Key, vendor: Product, weight: torch.Tensor, bias: torch.Tensor | None) -> Certificate:
    import torch

    start = time.perf_counter()
    x = linear.revealing(weight, BASE)
    del weight
    # A layer may leave its bias out: of tensor-parallel ranks, only the first adds it.
    biases = [bias] if bias is None else [bias, torch.zeros_like(bias), None]
    compared, differing, first, passed = 0, 0, "", []
    wants = [vendor(x, given) for given in biases]
    if not all(bool(torch.isfinite(want).all()) for want in wants):
        raise ArithmeticError("the weights give values that are not finite")
    for m in ROWS:
        unequal = tried = 0
        for (at, rows), (want, given) in itertools.product(_company(x, m), zip(wants, biases)):
            got = vendor(rows, given)
            for begin in range(0, m, BASE):
                part = got[begin : begin + BASE]
                unequal += bits.differing(part, want[at : at + part.shape[0]])
                tried += part.numel()
        compared, differing = compared + tried, differing + unequal
        if unequal:
            first = first or f"M={m}: {unequal} of {tried} elements"
        else:
            passed.append(m)
    evidence = Evidence(list(ROWS), compared, differing, first)
    seconds = round(time.perf_counter() - start, 3)
    return Certificate(asked, "library", differing == 0, passed, evidence, seconds, certificates.today())


def _company(x: torch.Tensor, m: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(place, m rows of x from this place on; past BASE, copies of all rows one after the other)."""
    if m > BASE:
        yield 0, x.repeat(-(-m // BASE), 1)[:m]
        return
    last = BASE - m
    for at in sorted({last * i // (_PLACES - 1) for i in range(_PLACES)} if m <= 64 else {last // 2}):
        yield at, x[at : at + m]


def dequantized_product(weight: torch.Tensor) -> Product:
    """The bundled GEMM on a dequantized weight [N, K] of x's dtype. Order: kernels/cpu/README.md."""
    import torch

    n, k = weight.shape
    packed = torch.ops.bi_cpu.gemm_pack(weight)
    return lambda x, bias: torch.ops.bi_cpu.gemm(x, packed, n, k, None if bias is None else bias.to(x.dtype))


_EXACT = 1024  # products of two 8-bit integers whose sum is exact in fp32: 1024 * 127 * 127 < 2 ** 24


def integer_product(weight: torch.Tensor, scale: torch.Tensor) -> Product:
    """INT8 rows times INT8 weight by the bundled GEMM: exact integer sums, one scale for each row of x.

    weight: int8 [N, K]. scale: fp32 [N]. A row's scale is its largest absolute value over 127; integers round to even.
    Each result is sum * row's scale * output's scale + bias, in this order in fp32, rounded once.
    """
    import torch

    n, k = weight.shape
    edges = [*range(0, k, _EXACT), k]
    spans = list(itertools.pairwise(edges))
    packed = [torch.ops.bi_cpu.gemm_pack(weight[:, a:b].float().contiguous()) for a, b in spans]
    scale = scale.float().reshape(n)

    def product(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        wide = x.float()
        step = wide.abs().amax(-1, keepdim=True) / 127
        q = (wide / step.clamp_min(torch.finfo(torch.float32).tiny)).round()
        total = torch.zeros(x.shape[0], n, dtype=torch.int32)
        for (a, b), part in zip(spans, packed, strict=True):
            total += torch.ops.bi_cpu.gemm(q[:, a:b].contiguous(), part, n, b - a, None).to(torch.int32)
        y = total.float() * step * scale
        return (y if bias is None else y + bias.float()).to(x.dtype)

    return product


def _define_op() -> None:
    """Define torch.ops.bi_patch.cpu_quantized, which runs a layer's route in compiled code.

    number: int64, without dimensions: the layer's number. Raises CertificateFailed if no living layer has this number,
    or if its weight has other sizes.
    """
    define(
        "cpu_quantized(Tensor x, Tensor? bias, Tensor number, int n) -> Tensor",
        _run,
        "CPU",
        lambda x, bias, number, n: x.new_empty((*x.shape[:-1], n)),
    )


def _run(x: torch.Tensor, bias: torch.Tensor | None, number: torch.Tensor, n: int) -> torch.Tensor:
    held, _ = _layers.called(number, n, x.shape[-1])
    return held(x, bias)
